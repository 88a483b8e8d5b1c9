"""What is learnt: data drawn on the fly, and how an answer is scored."""

from deltaproduct_jax.tasks.formal_languages import FormalLanguageTask as FormalLanguageTask
from deltaproduct_jax.tasks.groups import GroupTask as GroupTask
from deltaproduct_jax.tasks.recall import RecallTask as RecallTask
from deltaproduct_jax.tasks.registry import register_task as register_task

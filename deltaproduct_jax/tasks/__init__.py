"""What is learnt: data drawn on the fly, and how an answer is scored."""

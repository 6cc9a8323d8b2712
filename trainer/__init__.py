"""Training: the tokenizer, and one short recipe per stage around one shared loop."""

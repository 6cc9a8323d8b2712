"""What a person talks to: a loaded model that answers, and the scoring of its answers."""

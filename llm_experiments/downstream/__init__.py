"""What a trained model is good for: sentiment, cloze and held-out loss, by token frequency."""

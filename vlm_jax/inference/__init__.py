"""What a trained model is asked for beside a loss."""

"""What a training run is made of, besides the model and its data."""

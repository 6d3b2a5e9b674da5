"""From a prefix to actions: what a trained model does when it serves."""

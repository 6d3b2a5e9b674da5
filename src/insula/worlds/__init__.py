"""Places to act in. They know nothing of models; evaluation drives them through Gymnasium's interface."""

"""Places to act in. They know nothing of models; whoever evaluates drives them through Gymnasium's interface."""

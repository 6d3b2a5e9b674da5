"""Open-loop, closed-loop and knowledge evaluation."""

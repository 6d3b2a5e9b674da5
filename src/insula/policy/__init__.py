"""What acts, and what speaks: a trained model in its four modes.

acting.py     observation → flow → chunk                    Policy
speaking.py   observation → tokens, bound by a grammar      Speaker
modes.py      FAST tokens → chunk; subtask → flow → chunk   TokenPolicy, SubtaskPolicy
command.py    insula ask: a question about pictures
"""

from insula.policy.acting import Inputs, Policy, Seed, draw_noise, join, noise_key

__all__ = ["Inputs", "Policy", "Seed", "draw_noise", "join", "noise_key"]

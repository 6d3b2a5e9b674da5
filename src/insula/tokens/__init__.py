"""Text and actions as tokens, and every mask over them.

fast.py      a chunk of actions ↔ a few ids (`FASTCodec`)
text.py      text ↔ ids: the embedded tokenizer, or a Gemma/PaliGemma one you have
dialects.py  how an instruction, a state and FAST ids are written as one sequence, as data
sequence.py  that sequence with its masks (`FASTTokenizer`)
masks.py     who may attend to whom
grammar.py   what may be said next, as an automaton; fast_grammar.py: whole chunks of actions, and nothing else
"""

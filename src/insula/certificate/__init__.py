"""The insulation certificate: how much of each loss's gradient reaches each part of a model, insulated and not.

    part              flow loss          flow loss, not insulated   token loss
    vision            0 exactly          > 0                        > 0
    embedding         0 exactly          > 0                        > 0
    backbone layer i  0 exactly          > 0                        > 0
    final norm        0 exactly          0: nothing leads there     > 0
    expert            > 0                > 0                        0 exactly
    action head       > 0                > 0                        0 exactly

The token head has no row of its own: it is the embedding again.

A zero alone proves nothing: adaRMS gates start at zero, so an untrained model shows zeros under any scheme. Hence the
control, the same loss without insulation, which must not be zero where insulation is claimed.

table.py      the columns and rows of such a table, and their names
proof.py      judging: what a table shows
gradients.py  measuring: from a model and a batch to a table
stored.py     `certificate.json`, which travels with a checkpoint
"""

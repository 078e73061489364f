"""What memories are made of. The methods themselves stand in `reknow.methods`, one file each.

base                  the steps of an edit, for all of them
distances             what prompts are compared by, how far they lie apart: GRACE, DEFER, MELO, WISE, MEMOIR, CaliNet
codebook              tables of keys with radii: GRACE, MELO
side_memory           WISE's shards and their routing
residual_memory       MEMOIR's masks, and the columns that they open
slots                 CaliNet's slots
embedding, nearest    texts as vectors, and the nearest of them: IKE, SERAC
demonstrations        IKE's demonstrations
serac                 SERAC's classifiers, models, memory and training
"""

"""What memories are made of. The methods themselves stand in `reknow.methods`, one file each.

base                  the steps of an edit, for all of them
distances             what prompts are compared by, and how far they lie apart: GRACE, DEFER, MELO, WISE, CaliNet
codebook              tables of keys with radii: GRACE, MELO
side_memory           WISE's shards and their routing
slots                 CaliNet's slots
embedding, nearest    texts as vectors, and the nearest of them: IKE, SERAC
demonstrations        IKE's demonstrations
serac                 SERAC's classifiers, models, memory and training
"""

"""What SERAC's memory is made of; no other method reads it. Each file stands on those before it:

states    texts → states of their tokens, by a frozen encoder
scope     the scope classifiers that read them, and their loss
models    what is trained: the classifier, and the counterfactual model that answers in scope
memory    the running memory: which question goes to the counterfactual model, with which edit
cases     questions inside and outside the scope of an edit, to train on
learner   the losses on them
"""

"""What methods that learn to edit share: the training, its loop, trained editors, gradients as factors."""

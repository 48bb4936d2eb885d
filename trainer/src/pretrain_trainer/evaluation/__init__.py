"""What a model is worth on the way: losses on held-out sources, evaluations of users, texts that it writes."""

"""Types shared by all packages of pretrain-operator."""

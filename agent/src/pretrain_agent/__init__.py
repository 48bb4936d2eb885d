"""The worker pod's agent: torchrun under the coordinator's rendezvous."""

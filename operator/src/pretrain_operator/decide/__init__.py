"""Pure decisions: observation, policies, desired pods, status."""

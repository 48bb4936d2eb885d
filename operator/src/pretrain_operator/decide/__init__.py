"""Pure decisions: observation, ordered chains of policies, the desired pods and the status."""

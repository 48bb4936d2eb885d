"""Local processes where the pods would be."""

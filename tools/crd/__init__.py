"""Generator of the CustomResourceDefinition of PretrainJob."""

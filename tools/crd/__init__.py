"""The CustomResourceDefinition of PretrainJob, generated from the models."""

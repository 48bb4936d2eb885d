"""The PretrainJob resource: fields with units, defaults and bounds, and rules over them."""

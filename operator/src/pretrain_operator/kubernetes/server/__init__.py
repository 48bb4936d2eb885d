"""The operator process: options, servers, watch, authentication."""

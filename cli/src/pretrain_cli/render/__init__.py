"""Terminal views, reports and plots."""

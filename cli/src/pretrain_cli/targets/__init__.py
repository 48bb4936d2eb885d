"""Targets of commands: runs, jobs and checkpoint stores."""

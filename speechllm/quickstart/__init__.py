"""The embedded default: real small weights and real speech, from download to report."""

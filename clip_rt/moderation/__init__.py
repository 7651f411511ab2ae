"""Decisions on images by a policy: allow, review or block, and why."""

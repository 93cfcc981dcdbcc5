"""Evaluation: tasks, metrics, a harness that samples and scores, and a report.

A task says what its problems are, how a model is asked, and whether an answer is right. Sampling
and scoring meet only in a samples file, so that either can be done elsewhere.
"""

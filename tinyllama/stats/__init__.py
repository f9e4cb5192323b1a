"""Statistics that evaluation, serving and reports share: numbers in, numbers out, nothing about tasks or files.

student: Student's t. means: Welch's test, Holm's correction. intervals: of one score, or of a weighted sum of scores.
paired: tests of two models' answers to the same items.
"""

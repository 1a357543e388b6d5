"""The course: exercises that the tests of the paper's equations grade."""

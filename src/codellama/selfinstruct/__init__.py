"""Self-instruct with execution feedback: questions, tests and solutions, kept where they hold."""

"""The paper's tables on a model of one's own: its numbers beside ours, and whether its orderings hold."""

"""How many machines a load needs: work of a model, speed of hardware, queueing, a choice."""

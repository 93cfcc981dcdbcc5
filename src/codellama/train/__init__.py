"""Training: one loop for every stage of the cascade."""

from codellama.train.loop import TrainingStopped, train

__all__ = ["TrainingStopped", "train"]

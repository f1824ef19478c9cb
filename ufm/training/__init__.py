"""Theory against training: a table of free features under SGD, Adam and AdamW."""

from ufm.training.settings import TableTraining
from ufm.training.table import TrainedTable, train_table

__all__ = ["TableTraining", "TrainedTable", "train_table"]

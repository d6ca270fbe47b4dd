"""Irregular time series: data, and the one trainer of the models in pfode.models.

Series      series of different lengths and times, with missing values, as padded tensors (data.py)
read        a long table: id, time, channel, value, label (tables.py); read_ts: a .ts file (ts_files.py)
Scale       what series are measured in, from the training part (data.py)
Trainer     any model with `loss(series, generator)`; resumes bit for bit (training.py)
"""

from pfode.models.series.data import Scale as Scale
from pfode.models.series.data import Series as Series
from pfode.models.series.tables import read as read
from pfode.models.series.training import Trainer as Trainer
from pfode.models.series.training import Training as Training
from pfode.models.series.ts_files import read_ts as read_ts

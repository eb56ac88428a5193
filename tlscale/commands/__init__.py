from tlscale.tracking.working_folder import import_torch

import_torch()  # before any of the commands does

"""Options of training runs, for `lotlip train --recipe NAME`."""

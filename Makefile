# make demo: noise destroys digits, a small U-Net learns to undo it, and draws new ones (outputs/demo);
# with more guidance than usual, which helps a network that has learnt so little.
# make test: the tests. Both set up .venv first (a few minutes and about 6 GB, once).
# DATA_DIR names a folder that holds MNIST/raw already: make demo DATA_DIR=path/to/data

PYTHON ?= python3
DATA_DIR ?= data
BIN = .venv/bin

demo: .venv/ready
	$(BIN)/python visualize_diffusion.py --data_dir "$(DATA_DIR)" --output_dir outputs/demo
	$(BIN)/python train.py --preset quick --steps 560 --overwrite --data_dir "$(DATA_DIR)" --output_dir outputs/demo
	$(BIN)/python sample.py --show_intermediate --guidance 1.5 --checkpoint outputs/demo/model_final.pt --output_dir outputs/demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: demo test

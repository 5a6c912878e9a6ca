# Thin: the work is ops/setup, cargo and `verbund up`.
# Every cargo call selects the whole workspace: one resolution of features, so that nothing third-party compiles twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help
DATA  ?= $(HOME)/.local/share/verbund/demo
PORT  ?= 8080
RANKS ?= 2
env = eval "$$(ops/setup env)" &&
# A test that hangs ends after so many seconds, with all that it started; at a terminal Ctrl-C must still reach the tests.
bounded = timeout $$([ -t 0 ] && echo --foreground) -k 30

.PHONY: help build run test test-all bench lint fmt

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# One small test beside the binary: with it cargo takes the features that the tests' dependencies ask for, so that a later
# `make test` does not compile shared libraries again.
build: ## install what is missing and build the binary with its web page
	@ops/setup tools
	@ops/setup page
	@$(env) cargo build --locked --workspace --bin verbund --test answers

run: build ## start a whole cluster here, with a demo tenant and example documents
	@ops/setup models
	@$(env) exec "$$CARGO_TARGET_DIR/debug/verbund" up --data "$(DATA)" --port $(PORT) --ranks $(RANKS) --examples ops/examples

test: build ## every test that takes seconds, a whole cluster's included
	@ops/setup models
	@ops/setup tests
	@$(env) cargo test --locked --workspace --no-run
	@$(env) $(bounded) 2400 cargo test --locked --workspace

test-all: test ## and the slow ones
	@$(env) $(bounded) 5400 cargo test --locked --workspace -- --ignored

# ONLY=engine,serving runs some parts; CANDLE=path/to/engine compares with candle too. A peer that cannot be had is left out.
SHAPES = tiny:Q8_0 1b:Q4_0 1b:Q4_K_M 1b:Q8_0 8b:Q4_0
bench: build ## measure beside the machine's limits and llama.cpp, and write docs/benchmarks.md
	@ops/setup models
	@$(env) cargo build --locked --workspace --bin verbund --bin shapes --bin report --bin allreduce --bin constrain --bin speculate --test answers
	@ops/setup bench $(SHAPES) || echo "make bench: measuring without the peer"
	@$(env) "$$CARGO_TARGET_DIR/debug/report" $(if $(ONLY),--only $(ONLY)) $(if $(CANDLE),--candle $(CANDLE)) $(REPORT)

lint: ## format, clippy and dependency checks
	@ops/setup tools
	@ops/setup deny
	@$(env) cargo fmt --all --check
	@$(env) cargo clippy --locked --workspace --all-targets -- -D warnings
	@$(env) cargo fetch --locked --target x86_64-unknown-linux-gnu
	@$(env) cargo deny --offline --locked check bans licenses sources
	@$(env) if GIT_TERMINAL_PROMPT=0 timeout -k 5 60 cargo deny fetch db </dev/null >/dev/null 2>&1; \
		then cargo deny --offline --locked check advisories; \
		else echo "advisories NOT checked: their database cannot be fetched from here within 60 s"; fi

fmt: ## format the sources
	@$(env) cargo fmt --all

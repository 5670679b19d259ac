from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from tests.stock_app.task import fresh_state

app = ServerApp()
results = []
make_strategy = FedAvg  # the one line that a user of Flower changes


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = make_strategy()
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(fresh_state()),
        train_config=ConfigRecord({"lr": 0.2}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    results.append(result)

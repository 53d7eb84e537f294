"""Federated training on clients whose data differ, with running statistics averaged, merged, and measured.

Each client has digits of its own classes, some brighter than others. After each round the server averages the weights.
Averages of the clients' running variances lack the variance between the clients. `bn.running_moments(count)` makes
moments of them, which merge with that term. And with the averaged weights each client can measure its inputs anew:
their moments merge to those of one machine with all of the data. Moments travel as bytes, data do not.

Clients are processes that talk to the server by sockets on this machine; with `--flower`, by flower's NumPyClient.
"""

import importlib.util
import io
import multiprocessing
import socket
import struct
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find `examples` and `cbn`
    import examples  # noqa: F401  which says what is not installed

import numpy as np
from threadpoolctl import threadpool_limits

import cbn
from cbn import BatchNorm1d, Moments
from examples import digits_mlp, layers, report, training
from examples.layers import softmax_cross_entropy

CLASSES = ((0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9))  # of each client
BRIGHTER = (0.0, 0.5, 1.0)  # than the pixels, which are in [0, 1]
BATCH, RATE = 16, 3e-3
AVERAGED, MERGED, MEASURED = "averaged", "merged", "measured anew"
WORDS = (AVERAGED, MERGED, MEASURED)
COLORS = dict(zip(WORDS, (report.WITHOUT_BN, report.PALETTE[4], report.WITH_BN), strict=True))
LARGEST = 1 << 26  # bytes of a message
DEADLINE = 60.0  # seconds for the other side


def data_of(client):
    """The digits of a client: held-out ones, too, are of its classes and as bright."""
    data = digits_mlp.digits()
    of_train, of_test = (np.isin(y, CLASSES[client]) for y in (data.y_train, data.y_test))
    brighter = np.float32(BRIGHTER[client])
    return training.Data(
        data.x_train[of_train] + brighter, data.y_train[of_train], data.x_test[of_test] + brighter, data.y_test[of_test]
    )


def network(seed):
    return digits_mlp.network(64, True, np.random.default_rng([seed, 0]))


def norms(model):
    return [one for one in model.layers if isinstance(one, BatchNorm1d)]


def weights(model):
    """The arrays that are averaged."""
    return [parameter for parameter, _ in model.parameters()]


def set_arrays(targets, arrays):
    for target, a in zip(targets, arrays, strict=True):
        target[...] = a


def moments_of(blobs):
    """What clients sent, one list for each client, merged for each layer; bytes that are no moments are refused."""
    return [Moments.merge(map(Moments.from_bytes, of_layer)) for of_layer in zip(*blobs, strict=True)]


# ---- a client --------------------------------------------------------------------------------------------------------

# flower's NumPyClient has these two methods, and flower calls them
Base = object
if importlib.util.find_spec("flwr") and "--flower" in sys.argv:
    from flwr.client import NumPyClient as Base


class DigitsClient(Base):
    """What one participant does: it trains, or measures, and sends weights and moments."""

    def __init__(self, client, seed):
        self.data, self.model, self.client, self.rounds, self.seed = data_of(client), network(seed), client, 0, seed

    def fit(self, parameters, config):
        """Train for an epoch from these weights and statistics, or measure with them."""
        model, x = self.model, self.data.x_train
        statistics = [a for bn in norms(model) for a in (bn.running_mean, bn.running_var)]
        set_arrays([*weights(model), *statistics], parameters)
        with threadpool_limits(1):
            if config["task"] == "measure":
                return [], len(x), {"moments": self._measured(), "client": bytes([self.client])}
            optimizer = layers.Adam(model.parameters(), RATE)
            rng = np.random.default_rng([self.seed, 1, self.client, self.rounds])
            model.train()
            for index in training.minibatches(len(x), BATCH, rng):
                model.zero_grad()
                _, dy = softmax_cross_entropy(model(x[index]), self.data.y_train[index])
                model.backward(dy)
                optimizer.step()
            self.rounds += 1
        found = _packed(bn.running_moments(len(x)) for bn in norms(model))
        arrays = [a.copy() for a in (*weights(model), *statistics)]
        return arrays, len(x), {"moments": found, "client": bytes([self.client])}

    def _measured(self):
        """The moments of what reaches each batch norm, of which the ones before normalize with what the server sent."""
        model, x = self.model, self.data.x_train
        model.eval()
        found = []
        for one in model.layers:
            if isinstance(one, BatchNorm1d):
                found.append(cbn.moments(x))
            x = one(x)
        return _packed(found)

    def evaluate(self, parameters, config):
        raise NotImplementedError("the server evaluates")


def _packed(moments):
    """Several moments as one value, as flower wants it: their bytes with a length before each."""
    return b"".join(struct.pack("<I", len(blob)) + blob for blob in (m.to_bytes() for m in moments))


def _unpacked(content):
    found = []
    while content:
        (length,) = struct.unpack_from("<I", content)
        found.append(content[4 : 4 + length])
        content = content[4 + length :]
    return found


# ---- the server ------------------------------------------------------------------------------------------------------


class Server:
    """Averages weights, and keeps each kind of running statistics."""

    def __init__(self, seed):
        self.model = network(seed)
        self.model.eval()
        data = [data_of(client) for client in range(len(CLASSES))]
        self.x = np.concatenate([one.x_test for one in data])
        self.y = np.concatenate([one.y_test for one in data])
        self.x_train = np.concatenate([one.x_train for one in data])  # to compare with: no client sends it
        self.statistics = {words: self._statistics() for words in WORDS}

    def _statistics(self):
        return [a.copy() for bn in norms(self.model) for a in (bn.running_mean, bn.running_var)]

    def parameters(self, words=MEASURED):
        return [*(a.copy() for a in weights(self.model)), *self.statistics[words]]

    def take_trained(self, results):
        """Results of clients that trained: (arrays, number of samples, metrics)."""
        n = sum(count for _, count, _ in results)
        n_weights = len(weights(self.model))
        mean = [sum(count / n * arrays[i] for arrays, count, _ in results) for i in range(len(results[0][0]))]
        set_arrays(weights(self.model), mean[:n_weights])
        self.statistics[AVERAGED] = mean[n_weights:]
        self._set(MERGED, moments_of([_unpacked(metrics["moments"]) for _, _, metrics in results]))
        self.statistics[MEASURED] = [a.copy() for a in self.statistics[MERGED]]  # where measuring begins

    def take_measured(self, results):
        """Results of clients that measured with the averaged weights."""
        self._set(MEASURED, moments_of([_unpacked(metrics["moments"]) for _, _, metrics in results]))

    def _set(self, words, moments):
        for bn, m in zip(norms(self.model), moments, strict=True):
            bn.set_running_moments(m)
        self.statistics[words] = self._statistics()

    def figures(self, words):
        """Held-out loss and accuracy, and how far the variances of the first layer are from those of all data."""
        set_arrays([a for bn in norms(self.model) for a in (bn.running_mean, bn.running_var)], self.statistics[words])
        y = self.model(self.x)
        first = norms(self.model)[0]
        exact = self.model.layers[0](self.x_train).astype(np.float64).var(axis=0, ddof=1)
        error = np.abs(first.running_var / exact - 1).max()
        return softmax_cross_entropy(y, self.y)[0], float(np.mean(y.argmax(axis=1) == self.y)), float(error)


def federate(ask, server, rounds, bar=None):
    """Rounds of training and measuring; `ask(parameters, config)` returns the clients' results. {words: figures}."""
    found = {words: [] for words in WORDS}
    for _ in range(rounds):
        server.take_trained(ask(server.parameters(), {"task": "train"}))
        for _ in norms(server.model):  # the first layer's statistics are right at once, the second one's with them
            server.take_measured(ask(server.parameters(), {"task": "measure"}))
        for words in WORDS:
            found[words].append(server.figures(words))
        if bar is not None:
            bar.update()
    return {words: np.array(figures) for words, figures in found.items()}


# ---- by sockets ------------------------------------------------------------------------------------------------------


def send(connection, arrays, count, metrics):
    """A message: arrays as an .npz, which has no code in it, a number, and what to do or the moments."""
    content = io.BytesIO()
    texts = {f"text {name}": np.frombuffer(value, np.uint8) for name, value in metrics.items()}
    np.savez(content, count=count, **{f"array {i}": a for i, a in enumerate(arrays)}, **texts)
    connection.sendall(struct.pack("<Q", content.tell()) + content.getbuffer())


def receive(connection):
    (length,) = struct.unpack("<Q", exactly(connection, 8))
    if length > LARGEST:
        raise ValueError(f"a message of {length} bytes; expected {LARGEST} at most")
    with np.load(io.BytesIO(exactly(connection, length)), allow_pickle=False) as content:
        arrays = [content[f"array {i}"] for i in range(sum(name.startswith("array ") for name in content.files))]
        metrics = {name[5:]: content[name].tobytes() for name in content.files if name.startswith("text ")}
        return arrays, int(content["count"]), metrics


def exactly(connection, n):
    found = bytearray()
    while len(found) < n:
        part = connection.recv(min(n - len(found), 1 << 20))
        if not part:
            raise ConnectionError("the other side has hung up")
        found += part
    return bytes(found)


def take_part(address, client, seed):
    """A client, in a process of its own, until the server hangs up."""
    participant = DigitsClient(client, seed)
    with socket.create_connection(address, timeout=DEADLINE) as connection:
        connection.sendall(bytes([client]))
        while True:
            try:
                parameters, _, config = receive(connection)
            except ConnectionError:
                return
            send(connection, *participant.fit(parameters, {"task": config["task"].decode()}))


def by_sockets(seed, rounds, bar):
    """`federate` with clients at the other end of sockets on this machine."""
    server = Server(seed)
    start = multiprocessing.get_context("spawn").Process
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(DEADLINE)
        address = listening.getsockname()
        processes = [start(target=take_part, args=(address, i, seed), daemon=True) for i in range(len(CLASSES))]
        for process in processes:
            process.start()
        connections = {}
        try:
            while len(connections) < len(CLASSES):
                connection, _ = listening.accept()
                connection.settimeout(DEADLINE)
                connections[exactly(connection, 1)[0]] = connection
            clients = [connections[i] for i in range(len(CLASSES))]  # in their order, in which sums are made

            def ask(parameters, config):
                for client in clients:
                    send(client, parameters, 0, {name: value.encode() for name, value in config.items()})
                return [receive(client) for client in clients]

            return federate(ask, server, rounds, bar)
        finally:
            for connection in connections.values():
                connection.close()
            for process in processes:
                process.join(DEADLINE)


# ---- by flower -------------------------------------------------------------------------------------------------------


def be_flowers_client(address, client, seed):
    from flwr.client import start_client

    start_client(server_address=address, client=DigitsClient(client, seed).to_client())


def by_flower(seed, rounds, bar):
    """`federate` as a strategy of flower's server: each of its rounds is a question and the answers."""
    from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import Strategy

    server, found = Server(seed), {words: [] for words in WORDS}
    per_round = 1 + len(norms(server.model))

    class Federation(Strategy):
        def initialize_parameters(self, client_manager):
            return ndarrays_to_parameters(server.parameters())

        def configure_fit(self, server_round, parameters, client_manager):
            client_manager.wait_for(len(CLASSES))
            task = "train" if (server_round - 1) % per_round == 0 else "measure"
            question = FitIns(ndarrays_to_parameters(server.parameters()), {"task": task})
            return [(client, question) for client in client_manager.all().values()]

        def aggregate_fit(self, server_round, results, failures):
            if failures:
                raise RuntimeError(f"a client failed: {failures[0]}")
            answers = sorted((one for _, one in results), key=lambda one: one.metrics["client"])  # sums have an order
            answers = [(parameters_to_ndarrays(one.parameters), one.num_examples, one.metrics) for one in answers]
            if (server_round - 1) % per_round == 0:
                server.take_trained(answers)
            else:
                server.take_measured(answers)
            if server_round % per_round == 0:
                for words in WORDS:
                    found[words].append(server.figures(words))
                bar.update()
            return ndarrays_to_parameters(server.parameters()), {}

        def configure_evaluate(self, server_round, parameters, client_manager):
            return []

        def aggregate_evaluate(self, server_round, results, failures):
            return None, {}

        def evaluate(self, server_round, parameters):
            return None

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=be_flowers_client, args=(address, i, seed), daemon=True) for i in range(len(CLASSES))]
    for process in processes:
        process.start()
    start_server(server_address=address, config=ServerConfig(num_rounds=rounds * per_round), strategy=Federation())
    for process in processes:
        process.join(DEADLINE)
    return {words: np.array(figures) for words, figures in found.items()}


# ---- the experiment --------------------------------------------------------------------------------------------------


def run(seeds, rounds, flower=False):
    """{words: (seeds, rounds, 3)}, of held-out loss and accuracy and the error of variances."""
    with report.progress(seeds * rounds, "federated") as bar:
        bar.unit = "round"
        runs = [(by_flower if flower else by_sockets)(seed, rounds, bar) for seed in range(seeds)]
    return {words: np.array([one[words] for one in runs]) for words in WORDS}


def show(results, out):
    """Table and picture."""
    seeds, rounds, _ = results[MEASURED].shape
    rows = [
        [
            words,
            training.mean_std(found[:, -1, 0]),
            training.mean_std(found[:, -1, 1], "test_accuracy"),
            f"{found[:, -1, 2].max():.1e}",
        ]
        for words, found in results.items()
    ]
    report.write(
        out,
        "federated",
        f"Digits of {len(CLASSES)} clients",
        f"{rounds} rounds of one epoch each, Adam at {RATE:g}, {seeds} seeds: mean ± standard deviation over the "
        "seeds, on held-out digits of all clients. The last column: the largest relative error of a running variance "
        "of the first layer, against all training data in one array.",
        report.table(["running statistics", "held-out loss", "held-out accuracy", "error of variance"], rows),
    )

    def paint(figure, axes):
        for ax, column, title in zip(axes[0], (0, 1), ("Held-out loss", "Held-out accuracy"), strict=True):
            for words, color in COLORS.items():
                values = results[words][:, :, column] * (100 if column else 1)
                report.band(ax, range(1, rounds + 1), values, color, words)
            ax.set_title(title)
            ax.set_ylabel("accuracy (%)" if column else "cross-entropy (nats)")
            ax.set_xlabel("round")
            ax.set_xticks(range(1, rounds + 1))
        axes[0, 0].set_yscale("log")
        report.legend(figure, axes[0, 0])

    report.draw(
        out / "federated.png",
        paint,
        size=(12, 4.4),
        columns=2,
        title=f"{len(CLASSES)} clients, mean and range of {seeds} seeds",
    )


def main(argv=None):
    parser = report.parser(__doc__, seeds=(3, "random seeds"), rounds=(8, "rounds of training"))
    parser.add_argument("--flower", action="store_true", help="let flower carry the messages, the package flwr")
    args = parser.parse_args(argv)
    if args.flower and not importlib.util.find_spec("flwr"):
        parser.error("--flower needs the package flwr")
    show(run(args.seeds, args.rounds, args.flower), args.out)


if __name__ == "__main__":
    sys.exit(report.run(main))

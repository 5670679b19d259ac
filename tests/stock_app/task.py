from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 24)
        self.norm = nn.BatchNorm1d(24)  # its buffers are float32 and int64
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def load_data(partition_id: int, num_partitions: int):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)[partition_id::num_partitions]
    y = torch.tensor(y)[partition_id::num_partitions]
    cut = 9 * len(y) // 10
    trainloader = DataLoader(TensorDataset(x[:cut], y[:cut]), batch_size=32)
    return trainloader, DataLoader(TensorDataset(x[cut:], y[cut:]), batch_size=32)


def train(net, trainloader, epochs, lr):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    running_loss = 0.0
    for _ in range(epochs):
        for x, y in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


def test(net, testloader):
    net.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in testloader:
            outputs = net(x)
            loss += nn.functional.cross_entropy(outputs, y, reduction="sum").item()
            correct += (outputs.argmax(1) == y).sum().item()
    count = len(testloader.dataset)
    return loss / count, correct / count


def fresh_state() -> "OrderedDict[str, torch.Tensor]":
    torch.manual_seed(0)
    return Net().state_dict()

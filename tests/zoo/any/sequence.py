"""Signals and sequences: CRNN, WaveNet, TCN, keyword spotting, framing, recurrent taggers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.any.case import Case, images, signals, tokens
from tests.zoo.common import conv_bn_act, init_convs


class CRNN(nn.Module):
    """Text lines: convolutions, the map as a sequence, a bidirectional LSTM, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            conv_bn_act(1, 24, 3), nn.MaxPool2d(2), conv_bn_act(24, 32, 3), nn.MaxPool2d((2, 1))
        )
        self.rnn = nn.LSTM(32 * 4, 12, bidirectional=True)
        self.embedding = nn.Linear(24, 20)
        init_convs(self)

    def forward(self, input: Tensor) -> Tensor:
        conv = self.cnn(input)
        b, c, h, w = conv.size()
        conv = conv.reshape(b, c * h, w)
        conv = conv.permute(2, 0, 1)
        recurrent, _ = self.rnn(conv)
        T, b, h = recurrent.size()
        t_rec = recurrent.view(T * b, h)
        output = self.embedding(t_rec)
        return output.view(T, b, -1)


def text_line(batch: int, seed: int, size: int) -> Tensor:
    """One channel, 16 high."""
    return images(1)(batch, seed, size)[:, :, :16]


class WaveNet(nn.Module):
    """Dilated convolutions, gates of tanh and sigmoid, residuals and skips."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, channels, 1)
        self.filters = nn.ModuleList()
        self.gates = nn.ModuleList()
        self.residuals = nn.ModuleList()
        self.skips = nn.ModuleList()
        for dilation in (1, 2, 4):
            self.filters.append(nn.Conv1d(channels, channels, 2, dilation=dilation))
            self.gates.append(nn.Conv1d(channels, channels, 2, dilation=dilation))
            self.residuals.append(nn.Conv1d(channels, channels, 1))
            self.skips.append(nn.Conv1d(channels, 24, 1))
        self.end1, self.end2 = nn.Conv1d(24, 24, 1), nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skip: Any = 0
        for i in range(len(self.filters)):
            residual = x
            f = torch.tanh(self.filters[i](x))
            g = torch.sigmoid(self.gates[i](x))
            x = f * g
            s = self.skips[i](x)
            try:
                skip = skip[:, :, -s.size(2) :]
            except TypeError:
                skip = 0
            skip = s + skip
            x = self.residuals[i](x) + residual[:, :, -x.size(2) :]
        x = F.relu(skip)
        x = F.relu(self.end1(x))
        return self.end2(x)


class Chomp1d(nn.Module):
    """Cuts off what causal padding added."""

    def __init__(self, chomp_size: int) -> None:
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TCN(nn.Module):
    """Temporal blocks with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.downsample = nn.Conv1d(4, 16, 1)
        for i, cin in enumerate((4, 16)):
            pad = 2 * 2**i
            conv = weight_norm(nn.Conv1d(cin, 16, 3, padding=pad, dilation=2**i))
            self.blocks.append(nn.Sequential(conv, Chomp1d(pad), nn.ReLU(), nn.Dropout(0.2)))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.blocks[0](x) + self.downsample(x))
        y = F.relu(self.blocks[1](y) + y)
        return self.linear(y[:, :, -1])


class KeywordSpotting(nn.Module):
    """Depthwise-separable convolutions over a spectrogram that a convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.filterbank = nn.Conv1d(1, 16, kernel_size=16, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(1)
        self.conv = conv_bn_act(1, 16, 3, 2)
        self.separable = nn.Sequential(conv_bn_act(16, 16, 3, groups=16), conv_bn_act(16, 16, 1))
        self.fc = nn.Linear(16, 12)
        init_convs(self)

    def forward(self, wave: Tensor) -> Tensor:
        x = self.filterbank(wave).abs().clamp(min=1e-2).log()
        x = self.bn(x.unsqueeze(1))
        x = self.separable(self.conv(x))
        x = F.avg_pool2d(x, kernel_size=x.shape[2:]).squeeze(-1).squeeze(-1)
        return self.fc(x)


class Framing(nn.Module):
    """Frames by Tensor.unfold, a window, a linear transform, overlapping patches by F.unfold."""

    window: Tensor

    def __init__(self, frame: int = 16) -> None:
        super().__init__()
        self.frame = frame
        self.register_buffer("window", torch.hann_window(frame) + 0.1)
        self.transform = nn.Linear(frame, 24)
        self.mix = nn.Linear(24 * 3, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, wave: Tensor) -> Tensor:
        frames = wave.squeeze(1).unfold(-1, self.frame, self.frame // 2)
        x = torch.relu(self.transform(frames * self.window))
        x = x.transpose(1, 2).unsqueeze(-1)
        x = F.unfold(x, kernel_size=(3, 1), padding=(1, 0)).transpose(1, 2)
        return self.head(torch.tanh(self.mix(x)))


class TextCNN(nn.Module):
    """Embedding, convolutions of several widths, the maximum over time."""

    def __init__(self, vocabulary: int = 60) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16, padding_idx=0)
        self.convs = nn.ModuleList([nn.Conv2d(1, 12, (k, 16)) for k in (2, 3, 4)])
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(36, 4)

    def conv_and_pool(self, x: Tensor, conv: nn.Module) -> Tensor:
        x = F.relu(conv(x)).squeeze(3)
        return F.max_pool1d(x, x.size(2)).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.embed(x)
        out = out.unsqueeze(1)
        out = torch.cat([self.conv_and_pool(out, conv) for conv in self.convs], 1)
        return self.fc(self.dropout(out))


class Tagger(nn.Module):
    """Embedding, bidirectional GRU, a large linear on top."""

    def __init__(self, vocabulary: int = 60) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.gru = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.fc = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 9))

    def forward(self, ids: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, hidden = self.gru(self.embed(ids), h0)
        return self.fc(out), torch.cat((hidden[-2], hidden[-1]), dim=1)


class AttentionPooling(nn.Module):
    """A learned weight for every step, and the weighted sum by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.attention = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x).transpose(1, 2)
        weights = torch.softmax(self.attention(x).squeeze(-1), dim=1)
        pooled = torch.bmm(weights.unsqueeze(1), x).squeeze(1)
        return self.fc(pooled)


_LSTM = "so small a recurrent layer is faster in float; overrides make it int8"
CASES = {
    "crnn": Case(CRNN, text_line, 32, 48, empty=False, macs=0.7, why=_LSTM),
    "wavenet": Case(WaveNet, signals(4), 32, 48),
    "tcn": Case(TCN, signals(4), 24, 32),
    "keyword_spotting": Case(KeywordSpotting, signals(1), 128, 160),
    "framing": Case(Framing, signals(1), 96, 128),
    "text_cnn": Case(TextCNN, tokens(60), 14, 20),
    "gru_tagger": Case(Tagger, tokens(60), 10, 16, macs=0.4, why=_LSTM),
    "attention_pooling": Case(AttentionPooling, signals(4), 20, 28),
}

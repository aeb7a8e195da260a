//! What is measured: one line per case.

use burn::tensor::DType;

use super::data::Documents::{One, Packed, Ragged};
use super::subjects::{Attention, Conv, CrossEntropy, EmbeddingBackward, Glu, Linear, Norm, ResidualNorm, Rotary, RunningSum, Scan, Ssd};
use super::{Case, Shape, Size};
use crate::KernelBackend;
use crate::glu::Activation;

/// Names that `--op` takes.
pub(super) const OPS: [&str; 17] = [
    "ssd",
    "ssd_step",
    "selective_scan",
    "selective_scan_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "rms_norm_gated",
    "rms_norm",
    "norm_residual",
    "rotary",
    "attention",
    "attention_step",
    "glu",
    "cross_entropy",
    "embedding_backward",
    "cumsum",
    "linear",
];

/// The table for a size.
pub(super) fn cases<B: KernelBackend>(size: Size, dtype: DType) -> Vec<Box<dyn Case<B>>> {
    let mut table = Table { rows: Vec::new(), dtype };
    match size {
        Size::Quick => table.quick(),
        Size::Cpu => table.cpu(),
        Size::Gpu => table.gpu(),
    }
    table.rows
}

/// The cases of shapes that were asked for.
pub(super) fn chosen<B: KernelBackend>(shapes: &[Shape], dtype: DType) -> Vec<Box<dyn Case<B>>> {
    let mut table = Table { rows: Vec::new(), dtype };
    for shape in shapes {
        match *shape {
            Shape::Ssd { b, l, h, p, g, n, softplus } => table.add([Ssd { softplus, ..table.ssd(b, l, h, p, g, n) }]),
            Shape::SelectiveScan { b, l, e, n, gate } => table.add([Scan { n, gate, ..table.scan(b, l, e) }]),
            Shape::Attention { b, l, h, g, p } => table.add([Attention { g, ..table.attention(b, l, h, p) }]),
            Shape::Conv { b, l, e, k } => table.add([Conv { k, ..table.conv(b, l, e) }]),
            Shape::Norm { b, l, e, groups, gate } => table.add([Norm { groups, gate, ..table.norm(b, l, e) }]),
            Shape::ResidualNorm { b, l, d, layer, added } => {
                table.add([ResidualNorm { residual: DType::F32, layer, added, ..table.residual(b, l, d) }]);
            }
            Shape::Rotary { b, l, h, p, half } => table.add([Rotary { half, ..table.rotary(b, l, h, p) }]),
            Shape::Glu { b, l, f, activation, gated } => table.add([Glu { activation, gated, ..table.glu(b, l, f) }]),
            Shape::Linear { rows, inputs, outputs } => table.add([table.linear(rows, inputs, outputs)]),
            Shape::CrossEntropy { rows, v } => table.add([table.loss(rows, v)]),
            Shape::EmbeddingBackward { tokens, v, d, float32 } => {
                let case = table.embedding(tokens, v, d);
                table.add([EmbeddingBackward { dtype: if float32 { DType::F32 } else { case.dtype }, ..case }]);
            }
        }
    }
    table.rows
}

struct Table<B: KernelBackend> {
    rows: Vec<Box<dyn Case<B>>>,
    dtype: DType,
}

/// Tokens of the large cases.
const TOKENS: usize = 65536;

impl<B: KernelBackend> Table<B> {
    fn ssd(&self, b: usize, l: usize, h: usize, p: usize, g: usize, n: usize) -> Ssd {
        Ssd { b, l, h, p, g, n, dtype: self.dtype, state: false, softplus: false, documents: One }
    }

    fn scan(&self, b: usize, l: usize, e: usize) -> Scan {
        Scan { b, l, e, n: 16, dtype: self.dtype, state: false, gate: false, documents: One }
    }

    fn conv(&self, b: usize, l: usize, e: usize) -> Conv {
        Conv { b, l, e, k: 4, dtype: self.dtype, state: false, documents: One }
    }

    fn norm(&self, b: usize, l: usize, e: usize) -> Norm {
        Norm { b, l, e, groups: 1, dtype: self.dtype, gate: true }
    }

    fn residual(&self, b: usize, l: usize, d: usize) -> ResidualNorm {
        ResidualNorm { b, l, d, dtype: self.dtype, residual: self.dtype, layer: false, added: true }
    }

    fn loss(&self, rows: usize, v: usize) -> CrossEntropy {
        CrossEntropy { rows, v, dtype: self.dtype }
    }

    fn embedding(&self, tokens: usize, v: usize, d: usize) -> EmbeddingBackward {
        EmbeddingBackward { tokens, v, d, dtype: self.dtype }
    }

    fn attention(&self, b: usize, l: usize, h: usize, p: usize) -> Attention {
        Attention { b, l, s: l, h, g: h, p, dtype: self.dtype, documents: One }
    }

    fn rotary(&self, b: usize, l: usize, h: usize, p: usize) -> Rotary {
        Rotary { b, l, h, p, half: p / 2, dtype: self.dtype }
    }

    fn glu(&self, b: usize, l: usize, f: usize) -> Glu {
        Glu { b, l, f, activation: Activation::Silu, gated: true, dtype: self.dtype }
    }

    fn linear(&self, rows: usize, inputs: usize, outputs: usize) -> Linear {
        Linear { rows, inputs, outputs, dtype: self.dtype, bias: false }
    }

    fn add(&mut self, cases: impl IntoIterator<Item = impl Case<B> + 'static>) {
        self.rows.extend(cases.into_iter().map(|case| Box::new(case) as Box<dyn Case<B>>));
    }

    fn quick(&mut self) {
        let ssd = self.ssd(2, 70, 4, 16, 2, 16);
        let wide = self.ssd(1, 130, 2, 64, 1, 128);
        self.add([
            wide,
            ssd,
            Ssd { state: true, softplus: true, ..ssd },
            Ssd { documents: Packed, ..ssd },
            Ssd { documents: Ragged, ..ssd },
        ]);
        self.add([Ssd { state: true, ..self.ssd(2, 1, 4, 16, 1, 32) }]);
        let scan = self.scan(2, 70, 32);
        self.add([scan, Scan { state: true, gate: true, documents: Packed, ..scan }, Scan { state: true, ..self.scan(2, 1, 32) }]);
        let conv = self.conv(2, 70, 32);
        self.add([conv, Conv { state: true, documents: Ragged, ..conv }, Conv { state: true, ..self.conv(2, 1, 32) }]);
        let norm = self.norm(2, 9, 64);
        self.add([norm, Norm { groups: 4, ..norm }, Norm { gate: false, ..norm }]);
        let attention = self.attention(2, 70, 4, 16);
        self.add([attention, Attention { g: 2, documents: Packed, ..attention }, Attention { l: 1, ..attention }]);
        let residual = ResidualNorm { residual: DType::F32, ..self.residual(1, 5, 33) };
        let layer = ResidualNorm { layer: true, ..residual };
        self.add([self.residual(2, 9, 64), residual, layer, ResidualNorm { added: false, ..layer }]);
        self.add([self.rotary(2, 9, 3, 16), Rotary { half: 3, ..self.rotary(1, 5, 2, 10) }]);
        for activation in Activation::ALL {
            self.add([true, false].map(|gated| Glu { activation, gated, ..self.glu(2, 9, 67) }));
        }
        self.add([self.loss(5, 131)]);
        self.add([self.embedding(70, 19, 24)]);
        self.add([RunningSum { outer: 3, n: 130, inner: 5 }, RunningSum { outer: 2, n: 70, inner: 1 }]);
        self.add([1, 3, 17, 100].map(|rows| self.linear(rows, 64, 136)));
        self.add([Linear { bias: true, ..self.linear(33, 35, 50) }, Linear { bias: true, ..self.linear(2, 35, 50) }]);
    }

    fn cpu(&mut self) {
        let ssd = self.ssd(1, 512, 24, 64, 1, 128);
        self.add([64, 512, 2048].map(|l| Ssd { l, ..ssd }));
        self.add([Ssd { state: true, softplus: true, ..ssd }, Ssd { documents: Packed, ..ssd }, Ssd { g: 8, ..ssd }]);
        self.add([1, 16].map(|b| Ssd { state: true, ..self.ssd(b, 1, 24, 64, 1, 128) }));
        let scan = Scan { gate: true, ..self.scan(1, 512, 1536) };
        self.add([64, 512, 2048].map(|l| Scan { l, ..scan }));
        self.add([Scan { l: 1, state: true, ..scan }]);
        self.add([self.conv(1, 512, 1792), Conv { state: true, ..self.conv(1, 1, 1792) }]);
        let norm = self.norm(1, 512, 1536);
        self.add([norm, Norm { gate: false, ..norm }]);
        let attention = self.attention(1, 512, 9, 64);
        self.add([Attention { g: 3, ..attention }, Attention { l: 2048, s: 2048, g: 3, ..attention }]);
        self.add([Attention { l: 1, s: 4096, g: 3, ..attention }]);
        self.add([self.residual(1, 512, 768)]);
        self.add([self.rotary(1, 512, 9, 64), self.rotary(1, 1, 9, 64)]);
        let glu = self.glu(1, 512, 1536);
        self.add([glu, Glu { activation: Activation::Gelu, ..glu }, Glu { activation: Activation::Relu2, gated: false, ..glu }]);
        self.add([self.loss(256, 50288)]);
        self.add([self.embedding(512, 50288, 768)]);
        self.add([RunningSum { outer: 1, n: 2048, inner: 24 }]);
        self.add([1, 16, 512].map(|rows| self.linear(rows, 768, 3352)));
    }

    fn gpu(&mut self) {
        let lengths = || (0..8).map(|i| 512usize << i);
        // Documents of one length, 64K tokens in all.
        let ssd = |this: &Self, l: usize, n: usize| this.ssd((TOKENS / l).max(1), l, 32, 64, 1, n);
        for n in [128, 64, 256] {
            self.add(lengths().map(|l| ssd(self, l, n)).collect::<Vec<_>>());
        }
        for tokens in [8192, 16384] {
            let small = |n, l| Ssd { b: tokens / l, ..ssd(self, l, n) };
            self.add([small(128, 2048), small(64, 2048), small(256, 2048), small(128, tokens), small(128, 512)]);
        }
        for l in [2048, 16384] {
            let case = ssd(self, l, 128);
            self.add([
                Ssd { g: 8, ..case },
                Ssd { state: true, ..case },
                Ssd { softplus: true, ..case },
                Ssd { documents: Packed, ..case },
                Ssd { documents: Ragged, ..case },
                Ssd { state: true, softplus: true, documents: Packed, g: 8, ..case },
            ]);
        }
        self.add([self.ssd(65, 1000, 32, 64, 1, 128), self.ssd(4, 16385, 32, 64, 1, 128), self.ssd(8, 2048, 64, 64, 1, 128)]);
        self.add([self.ssd(1, 200_000, 32, 64, 1, 128)]);
        self.add([self.ssd(8, 2048, 24, 64, 1, 128), Ssd { dtype: DType::F32, ..ssd(self, 2048, 128) }]);
        self.add([1, 16, 64, 128, 256].map(|b| Ssd { state: true, ..self.ssd(b, 1, 64, 64, 1, 128) }));

        self.add(lengths().map(|l| self.scan(TOKENS / l, l, 2048)).collect::<Vec<_>>());
        self.add([Scan { gate: true, ..self.scan(32, 2048, 2048) }, Scan { documents: Packed, ..self.scan(32, 2048, 2048) }]);
        self.add([1, 16, 128].map(|b| Scan { state: true, gate: true, ..self.scan(b, 1, 2048) }));

        let conv = self.conv(32, 2048, 4352);
        self.add([conv, Conv { b: 1, l: TOKENS, ..conv }, Conv { e: 1792, ..conv }, Conv { documents: Packed, ..conv }]);
        self.add([1, 16, 128].map(|b| Conv { state: true, ..self.conv(b, 1, 4352) }));

        let norm = self.norm(32, 2048, 4096);
        self.add([norm, Norm { groups: 8, ..norm }, Norm { e: 1536, ..norm }]);
        self.add([Norm { gate: false, ..norm }, Norm { gate: false, e: 2048, ..norm }, Norm { gate: false, e: 768, ..norm }]);

        for (h, p) in [(32, 64), (16, 128)] {
            self.add(lengths().skip(2).map(|l| self.attention(TOKENS / l, l, h, p)).collect::<Vec<_>>());
        }
        let attention = self.attention(32, 2048, 32, 64);
        self.add([Attention { g: 8, ..attention }, Attention { documents: Packed, ..attention }]);
        self.add([(1, 2048), (16, 2048), (1, 16384)].map(|(b, s)| Attention { b, l: 1, s, ..attention }));

        let residual = self.residual(32, 2048, 2048);
        let stream = ResidualNorm { residual: DType::F32, ..residual };
        self.add([residual, ResidualNorm { d: 768, ..residual }, stream]);
        self.add([residual, stream].map(|case| ResidualNorm { layer: true, ..case }));
        self.add([self.rotary(32, 2048, 32, 64), self.rotary(32, 2048, 16, 128), Rotary { half: 16, ..self.rotary(32, 2048, 32, 64) }]);
        let glu = self.glu(32, 2048, 5632);
        self.add([glu, Glu { activation: Activation::Gelu, ..glu }, Glu { activation: Activation::Relu2, gated: false, ..glu }]);
        self.add([self.loss(TOKENS, 50288), self.loss(16384, 128256), self.loss(8192, 50288)]);
        self.add([self.embedding(TOKENS, 50288, 2048), self.embedding(TOKENS, 50288, 768)]);
        self.add([(32, 2048, 32), (1, TOKENS, 32), (65536, 2048, 1)].map(|(outer, n, inner)| RunningSum { outer, n, inner }));
        self.add([
            self.linear(16384, 2048, 8512),
            self.linear(16384, 4096, 2048),
            self.linear(16384, 768, 3352),
            self.linear(8192, 8192, 8192),
        ]);
        self.add([Linear { bias: true, ..self.linear(16384, 2048, 8512) }, Linear { dtype: DType::F32, ..self.linear(4096, 2048, 8512) }]);
        for (inputs, outputs) in [(2048, 8512), (4096, 14336), (4096, 2048)] {
            self.add([1, 2, 4, 8, 16, 32, 128].map(|rows| self.linear(rows, inputs, outputs)));
        }
    }
}

//! Documents, padding and positions: what a batch of tokens means, and where each row stands between calls.

use std::sync::{Arc, Mutex};

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use terrarium_kernels::attention::step::{Angles, Standing};
use terrarium_kernels::attention::{AttentionMask, SlotIds};
use terrarium_kernels::{KernelBackend, Segments};

use crate::layers::{RopeConfig, RopeTables};

/// The meaning of a `[b, l]` batch of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    batch: usize,
    len: usize,
    /// Document of each token, `-1` at padding; absent when every token continues its row's document.
    documents: Option<Vec<i32>>,
}

/// Stands for the document that a row holds already.
const CONTINUE: i32 = i32::MAX;

/// A layout that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Wrong number of ids.
    #[error("a layout of {batch} x {len} tokens needs {expected} document ids, found {found}", expected = batch * len)]
    Count {
        /// Rows.
        batch: usize,
        /// Tokens per row.
        len: usize,
        /// Ids given.
        found: usize,
    },
    /// An id below -1.
    #[error("document id {id} at row {row}, position {position}: ids are -1 (padding) or not negative")]
    Id {
        /// Batch row.
        row: usize,
        /// Position in the row.
        position: usize,
        /// The id.
        id: i32,
    },
}

impl Layout {
    /// Every row continues its document; no padding.
    pub fn full(batch: usize, len: usize) -> Self {
        Self { batch, len, documents: None }
    }

    /// Rows of different lengths, padded at the end.
    pub fn ragged(lengths: &[usize], len: usize) -> Self {
        Self::padded(lengths, len, |n, t| t < n)
    }

    /// Rows of different lengths, padded at the start.
    pub fn left_padded(lengths: &[usize], len: usize) -> Self {
        Self::padded(lengths, len, |n, t| t + n >= len)
    }

    fn padded(lengths: &[usize], len: usize, real: impl Fn(usize, usize) -> bool) -> Self {
        if lengths.iter().all(|&n| n >= len) {
            return Self::full(lengths.len(), len);
        }
        let documents =
            lengths.iter().flat_map(|&n| (0..len).map(|t| if real(n, t) { CONTINUE } else { -1 }).collect::<Vec<_>>()).collect();
        Self { batch: lengths.len(), len, documents: Some(documents) }
    }

    /// Row-major document ids, `-1` for padding anywhere. A change of id from one real token to the next starts a new
    /// document: state, convolution, attention and positions begin afresh.
    ///
    /// # Errors
    /// [`LayoutError`] when the count is wrong or an id is below -1.
    pub fn documents(batch: usize, len: usize, ids: Vec<i32>) -> Result<Self, LayoutError> {
        if ids.len() != batch * len {
            return Err(LayoutError::Count { batch, len, found: ids.len() });
        }
        if let Some(at) = ids.iter().position(|&id| id < -1) {
            return Err(LayoutError::Id { row: at / len, position: at % len, id: ids[at] });
        }
        Ok(Self { batch, len, documents: Some(ids) })
    }

    /// `[b, l]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.batch, self.len]
    }

    fn is_padding(&self, row: usize, t: usize) -> bool {
        self.documents.as_ref().is_some_and(|ids| ids[row * self.len + t] == -1)
    }

    /// Document of a real token, `None` where it continues the row's.
    fn document(&self, row: usize, t: usize) -> Option<i32> {
        self.documents.as_ref().map(|ids| ids[row * self.len + t]).filter(|&id| id != CONTINUE)
    }
}

/// Where one row stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Row {
    /// The document last seen, as the caller numbers it.
    document: Option<i32>,
    /// The same, numbered by this crate: it grows with every new document.
    run: i32,
    /// Position of the next token in its document.
    position: i32,
    /// Run of every key/value slot, `-1` at padding.
    slots: Vec<i32>,
}

/// Where every row of a batch stands between two calls: part of a [`crate::Cache`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    rows: Vec<Row>,
    /// True once any row has held padding or a second document.
    mixed: bool,
}

impl Context {
    /// The start of `batch` rows.
    pub fn start(batch: usize) -> Self {
        Self { rows: vec![Row::default(); batch], mixed: false }
    }

    /// `batch` rows after `tokens` tokens of one document each, without padding.
    pub fn plain(batch: usize, tokens: usize) -> Self {
        let mut context = Self::start(batch);
        context.skip(tokens);
        context
    }

    /// Rows.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Key/value slots used so far, padding included.
    pub fn slots(&self) -> usize {
        self.rows.first().map_or(0, |row| row.slots.len())
    }

    /// Every row goes on by `tokens` tokens of its document.
    pub(crate) fn skip(&mut self, tokens: usize) {
        for row in &mut self.rows {
            row.document = row.document.or(Some(0));
            row.position += tokens as i32;
            row.slots.extend(std::iter::repeat_n(row.run, tokens));
        }
    }

    /// Keeps the given rows, in the given order.
    pub fn select_rows(&self, rows: &[usize]) -> Self {
        Self { rows: rows.iter().map(|&row| self.rows[row].clone()).collect(), mixed: self.mixed }
    }

    /// Places `layout` after what came before: the device-side [`Sequence`] for the mixers, and the context after it.
    ///
    /// # Panics
    /// When the batch sizes differ.
    pub fn advance<B: Backend>(mut self, layout: &Layout, device: &B::Device) -> (Sequence<B>, Self) {
        let [b, l] = layout.dims();
        assert_eq!(b, self.batch(), "the cache holds {} rows, the layout {b}", self.batch());
        let prev: Vec<i32> = self.rows.iter().map(|row| row.run).collect();
        let mut runs = vec![-1; b * l];
        let mut positions = vec![0; b * l];
        let mut order: Vec<i32> = Vec::with_capacity(b * l);
        for (index, row) in self.rows.iter_mut().enumerate() {
            let (padding, kept): (Vec<usize>, Vec<usize>) = (0..l).partition(|&t| layout.is_padding(index, t));
            for (slot, &t) in kept.iter().enumerate() {
                row.meet(layout.document(index, t));
                runs[index * l + slot] = row.run;
                positions[index * l + slot] = row.position;
                row.position += 1;
            }
            row.slots.extend_from_slice(&runs[index * l..(index + 1) * l]);
            self.mixed |= !padding.is_empty() || row.run > 0;
            order.extend(kept.iter().chain(&padding).map(|&t| t as i32));
        }
        let plain = runs.chunks(l.max(1)).zip(&prev).all(|(row, prev)| row.iter().all(|run| run == prev));
        let segments = (!plain).then(|| Segments::new(b, l, runs.clone(), prev, device).expect("runs are ordered by construction"));
        let s = self.slots();
        let mask = if self.mixed {
            let slots = self.rows.iter().flat_map(|row| row.slots.iter().copied()).collect();
            AttentionMask::documents(l, s, SlotIds { batch: b, queries: runs, slots }).expect("counts match by construction")
        } else {
            AttentionMask::causal(l, s)
        };
        let sorted = order.chunks(l.max(1)).all(|row| row.iter().enumerate().all(|(t, &from)| t as i32 == from));
        let order = (!sorted).then(|| Order::new(&order, [b, l], device));
        (Sequence { dims: [b, l], segments, positions: positions.into(), mask, order, rope: Arc::default(), place: None }, self)
    }
}

/// Rotary angles up to a capacity, by configuration.
type AngleMemo<B> = Arc<Mutex<Vec<(RopeConfig, Angles<B>)>>>;

/// Where the rows of a batch stand, on the device: for steps of one token each that go on with every row's document and are the same
/// call every time, so that they can be recorded (see [`crate::Decoder::step`]).
#[derive(Debug, Clone)]
pub struct StepPlace<B: Backend> {
    standing: Standing<B>,
    /// For all layers and all steps.
    angles: AngleMemo<B>,
}

impl<B: KernelBackend> StepPlace<B> {
    /// Behind `context`, for keys and values of up to `capacity` tokens.
    ///
    /// # Panics
    /// When the context holds more tokens than that.
    pub fn new(context: &Context, capacity: usize, device: &B::Device) -> Self {
        let positions: Vec<i32> = context.rows.iter().map(|row| row.position).collect();
        let documents = context.mixed.then(|| SlotIds {
            batch: context.batch(),
            queries: context.rows.iter().map(|row| row.run).collect(),
            slots: context.rows.iter().flat_map(|row| row.slots.iter().copied()).collect(),
        });
        let standing = Standing::new(context.slots(), &positions, documents.as_ref(), capacity, device);
        Self { standing: standing.unwrap_or_else(|error| panic!("{error}")), angles: Arc::default() }
    }

    /// Every row has read a token. Asks the host nothing.
    pub fn advance(self) -> Self {
        Self { standing: self.standing.advance(), ..self }
    }
}

impl<B: Backend> StepPlace<B> {
    /// Tokens for whose keys and values there is room.
    pub fn capacity(&self) -> usize {
        self.standing.capacity()
    }

    /// Numbers that change with every step, as they lie on the device.
    pub fn places(&self) -> &Tensor<B, 1, Int> {
        self.standing.places()
    }

    pub(crate) fn standing(&self) -> &Standing<B> {
        &self.standing
    }

    /// Rotary angles up to the capacity, computed once per configuration.
    pub(crate) fn angles(&self, config: &RopeConfig, device: &B::Device) -> Angles<B> {
        let mut known = self.angles.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, angles)) = known.iter().find(|(of, _)| of == config) {
            return angles.clone();
        }
        let made = Angles::new(&config.frequencies(), self.capacity(), device);
        known.push((config.clone(), made.clone()));
        made
    }
}

impl Row {
    /// Takes note of a real token of `document` (`None`: it continues whatever the row holds).
    fn meet(&mut self, document: Option<i32>) {
        if let (Some(new), Some(old)) = (document, self.document)
            && new != old
        {
            self.run += 1;
            self.position = 0;
        }
        self.document = document.or(self.document).or(Some(0));
    }
}

/// Moves padding behind the real tokens, so that mixers meet it only at the end of a row; and back.
#[derive(Debug, Clone)]
pub(crate) struct Order<B: Backend> {
    to_front: Tensor<B, 2, Int>,
    back: Tensor<B, 2, Int>,
}

impl<B: Backend> Order<B> {
    fn new(order: &[i32], [b, l]: [usize; 2], device: &B::Device) -> Self {
        let mut back = vec![0; b * l];
        for (row, sources) in order.chunks(l).enumerate() {
            for (slot, &from) in sources.iter().enumerate() {
                back[row * l + from as usize] = slot as i32;
            }
        }
        let upload = |values: Vec<i32>| Tensor::from_data(TensorData::new(values, [b, l]), device);
        Self { to_front: upload(order.to_vec()), back: upload(back) }
    }

    pub fn ids(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 2, Int> {
        ids.gather(1, self.to_front.clone())
    }

    pub fn restore(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let shape = x.dims();
        x.gather(1, self.back.clone().unsqueeze_dim::<3>(2).expand(shape))
    }
}

/// Rotary tables of one call, by configuration.
type RopeMemo<B> = Arc<Mutex<Vec<(RopeConfig, RopeTables<B>)>>>;

/// One call's documents, padding and positions on the device, shared by all layers.
#[derive(Debug, Clone)]
pub struct Sequence<B: Backend> {
    dims: [usize; 2],
    segments: Option<Segments<B>>,
    positions: Arc<[i32]>,
    mask: AttentionMask<B>,
    order: Option<Order<B>>,
    rope: RopeMemo<B>,
    place: Option<StepPlace<B>>,
}

impl<B: Backend> Sequence<B> {
    /// A batch without padding or document boundaries, at the start of its rows.
    pub fn start(batch: usize, len: usize, device: &B::Device) -> Self {
        Context::start(batch).advance(&Layout::full(batch, len), device).0
    }

    /// One token for each row, which stand at `place`.
    pub(crate) fn step(place: &StepPlace<B>) -> Self {
        let rows = place.standing.rows();
        Self {
            dims: [rows, 1],
            segments: None,
            positions: Arc::new([]),
            mask: AttentionMask::causal(1, 1),
            order: None,
            rope: Arc::default(),
            place: Some(place.clone()),
        }
    }

    /// Where the rows stand, if that is known on the device alone: positions and mask say nothing then.
    pub(crate) fn place(&self) -> Option<&StepPlace<B>> {
        self.place.as_ref()
    }

    /// `[b, l]`.
    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    /// Document boundaries and padding, if there are any. Padding stands at the end of rows here.
    pub fn segments(&self) -> Option<&Segments<B>> {
        self.segments.as_ref()
    }

    /// Position of each token in its document, row-major `[b, l]`.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }

    /// What each query may see.
    pub fn mask(&self) -> &AttentionMask<B> {
        &self.mask
    }

    pub(crate) fn order(&self) -> Option<&Order<B>> {
        self.order.as_ref()
    }

    /// Cosines and sines for this call, computed once per configuration.
    pub(crate) fn rope(&self, config: &RopeConfig, device: &B::Device) -> RopeTables<B> {
        let mut tables = self.rope.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, known)) = tables.iter().find(|(of, _)| of == config) {
            return known.clone();
        }
        let made = RopeTables::new(config, &self.positions, self.dims, device);
        tables.push((config.clone(), made.clone()));
        made
    }
}

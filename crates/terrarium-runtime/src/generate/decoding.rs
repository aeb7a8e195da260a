//! Token after token for a batch of rows: recorded and replayed where the device can, so that the host enqueues one thing a
//! step instead of hundreds.

use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive};
use terrarium_kernels::KernelBackend;
use terrarium_kernels::argmax::argmax;
use terrarium_kernels::backend::Memory;
use terrarium_kernels::record::{RecordError, Recorder, Recording};
use terrarium_kernels::sample::{Draws, SampleOptions, sample};
use terrarium_models::{Cache, Context, Decoder, Layout, StepPlace};

use crate::forward::host_values;
use crate::{Error, Result};

/// Steps that are taken one kernel at a time before one is recorded: they compile kernels and find memory.
const WARM: usize = 2;

/// Bytes of a layer's cache above which its memory is given back to the device before the next layer is copied.
const LARGE: usize = 1 << 26;
/// Most tokens for which room is made at once.
const MOST_AHEAD: usize = 4096;

/// How tokens are chosen on the device.
enum Chooser<B: KernelBackend> {
    /// The likeliest one.
    Greedy,
    /// Drawn.
    Drawn(SampleOptions, Draws<B>),
}

impl<B: KernelBackend> Chooser<B> {
    /// A token for each row, over `old` where that can be, and the chooser of the next ones.
    fn choose(self, logits: Tensor<B, 2>, known: usize, old: Tensor<B, 2, Int>) -> (Tensor<B, 2, Int>, Self) {
        match self {
            Self::Greedy => (argmax(logits, known, Some(old)), Self::Greedy),
            Self::Drawn(options, draws) => {
                let (ids, next) = sample(logits, known, options, draws, Some(old));
                (ids, Self::Drawn(options, next))
            }
        }
    }
}

/// What is known of the rows after their newest token.
pub struct Decoding<B: KernelBackend> {
    // Dropped first: it runs on what follows.
    recording: Option<Box<dyn Recording>>,
    model: Decoder<B>,
    known: usize,
    /// Where tokens are chosen on the device; taken only while a step runs.
    chooser: Option<Chooser<B>>,
    device: B::Device,
    /// `[rows, 1]`: the tokens to be read next.
    ids: Tensor<B, 2, Int>,
    /// `[rows, v]`, after the tokens read last.
    logits: Option<Tensor<B, 2>>,
    /// Taken only while a step runs.
    cache: Option<Cache<B>>,
    /// Where the rows stand, for models that keep keys and values, where the device writes these in place.
    place: Option<StepPlace<B>>,
    /// Tokens for which room is made at once.
    ahead: usize,
    /// The batch's rows still asked for, in order.
    active: Vec<usize>,
    /// Steps taken with these tensors.
    steps: usize,
    /// Why nothing is recorded, if that is worth telling.
    note: Option<String>,
    recorder: Option<Box<dyn Recorder<B>>>,
}

/// Where the tensors lie that a recorded step goes on from.
fn places<B: KernelBackend>(
    recorder: &dyn Recorder<B>,
    ids: &Tensor<B, 2, Int>,
    numbers: [Option<&Tensor<B, 1, Int>>; 2],
    cache: &Cache<B>,
) -> Result<Vec<u64>, RecordError> {
    let mut places = vec![recorder.int_address(&ids.clone().into_primitive())?];
    for numbers in numbers.into_iter().flatten() {
        places.push(recorder.int_address(&numbers.clone().into_primitive())?);
    }
    for tensor in cache.buffers() {
        let TensorPrimitive::Float(tensor) = tensor.into_primitive() else { return Err(RecordError("the cache is quantised".into())) };
        places.push(recorder.address(&tensor)?);
    }
    Ok(places)
}

/// Does `work` where tensors of this decoding live.
fn within<B: KernelBackend, T>(recorder: &Option<Box<dyn Recorder<B>>>, work: impl FnOnce() -> T) -> T {
    let Some(recorder) = recorder else { return work() };
    let (mut work, mut done) = (Some(work), None);
    recorder.within(&mut || done = work.take().map(|work| work()));
    done.unwrap_or_else(|| unreachable!("a recorder does what it is given"))
}

/// A copy of `cache` in memory of the recorder's own, with room for more keys and values where there are any. Memory is taken for a layer
/// at a time.
fn taken_over<B: KernelBackend>(
    recorder: &Option<Box<dyn Recorder<B>>>,
    cache: Cache<B>,
    room: usize,
    device: &B::Device,
) -> (Cache<B>, Option<RecordError>) {
    let Cache { context, layers } = cache;
    let rows: Vec<usize> = (0..context.batch()).collect();
    let (mut error, mut own) = (None, Vec::with_capacity(layers.len()));
    for layer in layers {
        let one = Cache { context: context.clone(), layers: vec![layer] };
        let copy = within(recorder, || match one.capacity() {
            Some(capacity) if capacity != room => one.clone().with_capacity(room),
            _ => one.clone().select_rows(&rows),
        });
        // The caller's memory is read until here.
        if let Some(Err(failed)) = recorder.as_ref().map(|recorder| recorder.wait()) {
            error = Some(failed);
        }
        own.extend(copy.layers);
        let bytes = one.bytes();
        drop(one);
        if bytes >= LARGE {
            // Else the caller's pool keeps it, and a large cache needs its memory twice.
            B::memory_cleanup(device);
        }
    }
    (Cache { context, layers: own }, error)
}

impl<B: KernelBackend> Drop for Decoding<B> {
    fn drop(&mut self) {
        // The weights may go with it, to a stream that does not know who reads them.
        if let Some(recorder) = &self.recorder
            && let Err(error) = recorder.wait()
        {
            log::warn!("{error}");
        }
    }
}

impl<B: KernelBackend> Decoding<B> {
    /// Goes on from `cache`. Of the logits the first `known` columns are tokens. Where keys and values are kept in place and `cache` has
    /// no room left, there is room for `ahead` more tokens (not above 4096), and for as many again whenever these are used up.
    pub fn new(model: &Decoder<B>, cache: Cache<B>, known: usize, ahead: usize, device: &B::Device) -> Self {
        let rows = cache.batch();
        let ahead = ahead.clamp(1, MOST_AHEAD);
        // Who read the prompt may have made room already.
        let room = cache.capacity().filter(|&capacity| capacity > cache.len()).unwrap_or(cache.len() + ahead);
        let constant = model.has_constant_state();
        let in_place = !constant && B::steps_in_place(device);
        let recorder = if constant || in_place { B::recorder(device) } else { None };
        let ids = Tensor::<B, 2, Int>::zeros([rows, 1], device);
        let (cache, ids, note) = match &recorder {
            None if in_place => (cache.with_capacity(room), ids, None),
            None => (cache, ids, None),
            Some(stream) => {
                // Streams wait for one another where new memory is met, not where old memory was changed in place, as weights are
                // in training. The sum reads what is newest on the caller's stream, so all before it is done when the copies begin.
                // On a recorder's stream memory must be its own.
                let own = within(&recorder, || Tensor::zeros([rows, 1], device) + ids.clone());
                let waited = stream.wait();
                drop(ids);
                let (cache, failed) = taken_over(&recorder, cache, room, device);
                (cache, own, waited.err().or(failed).map(|error| error.to_string()))
            }
        };
        let place = in_place.then(|| within(&recorder, || StepPlace::new(&cache.context, room, device)));
        Self {
            recording: None,
            model: model.clone().frozen(),
            known,
            chooser: recorder.is_some().then_some(Chooser::Greedy),
            device: device.clone(),
            ids,
            logits: None,
            cache: Some(cache),
            place,
            ahead,
            active: (0..rows).collect(),
            steps: 0,
            note,
            recorder,
        }
    }

    /// Chooses tokens on the device even where steps are not recorded.
    pub fn choosing(mut self) -> Self {
        self.chooser = Some(Chooser::Greedy);
        self
    }

    /// Draws tokens on the device, for rows of these seeds that have made so many draws.
    ///
    /// # Panics
    /// When these are not as many as rows, or an option is out of its range.
    pub fn draw(&mut self, options: SampleOptions, rows: &[(u64, u32)]) {
        assert_eq!(rows.len(), self.active.len(), "a seed for each row");
        // Rows that have ended draw on; nobody looks.
        let mut all = vec![(0, 0); self.ids.dims()[0]];
        for (&row, &seed) in self.active.iter().zip(rows) {
            all[row] = seed;
        }
        let draws = within(&self.recorder, || Draws::new(&all, &self.device));
        self.chooser = Some(Chooser::Drawn(options, draws));
        (self.recording, self.steps) = (None, 0);
    }

    /// Whether it chooses tokens, for [`Decoding::advance`] and [`Decoding::chosen`].
    pub fn chooses(&self) -> bool {
        self.chooser.is_some()
    }

    /// Rows still asked for.
    pub fn rows(&self) -> usize {
        self.active.len()
    }

    /// How many operations a replay does at once; nothing where steps are not recorded.
    pub fn recorded(&self) -> Option<usize> {
        self.recording.as_ref().map(|recording| recording.operations())
    }

    /// What the pools hold for this decoding alone, beside those of the calling thread; nothing where it has none of its own.
    pub fn memory(&self) -> Option<Memory> {
        self.recorder.as_ref()?;
        within(&self.recorder, || B::memory(&self.device))
    }

    /// Why steps are not recorded, where they were meant to be.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Reads `newest`, a token for each row.
    ///
    /// # Errors
    /// When the device failed.
    pub fn read(&mut self, newest: &[u32]) -> Result<()> {
        assert_eq!(newest.len(), self.active.len(), "a token for each row");
        let rows = self.ids.dims()[0];
        let mut ids = vec![0i32; rows];
        for (&row, &id) in self.active.iter().zip(newest) {
            ids[row] = id as i32;
        }
        match &self.recorder {
            // A recorded step reads this very memory.
            Some(recorder) => {
                let place = self.ids.clone().into_primitive();
                recorder.overwrite(&place, &ids).map_err(|error| Error::Device(error.to_string()))?;
            }
            None => self.ids = Tensor::from_data(TensorData::new(ids, [rows, 1]), &self.device),
        }
        self.forward()
    }

    /// Reads the tokens that it chose itself, without the host looking at them.
    ///
    /// # Errors
    /// When the device failed.
    ///
    /// # Panics
    /// When it does not choose: see [`Decoding::chooses`].
    pub fn advance(&mut self) -> Result<()> {
        assert!(self.chooses(), "no tokens were chosen");
        self.forward()
    }

    fn forward(&mut self) -> Result<()> {
        self.make_room();
        let due = self.recording.is_none() && self.recorder.is_some() && self.note.is_none() && self.steps >= WARM;
        if due && let Err(error) = self.record() {
            log::warn!("{error}");
            self.note = Some(error.to_string());
        }
        match &self.recording {
            Some(recording) => {
                recording.replay();
                if let Some(cache) = &mut self.cache {
                    cache.advance(1);
                }
            }
            None if self.recorder.is_some() && self.note.is_none() && self.steps + 1 == WARM => self.rehearse(),
            None => self.step(),
        }
        self.steps += 1;
        Ok(())
    }

    /// Where all slots for keys and values are in use, moves to larger buffers.
    fn make_room(&mut self) {
        let full = |place: &StepPlace<B>| self.cache.as_ref().is_some_and(|cache| cache.len() == place.capacity());
        if !self.place.as_ref().is_some_and(full) {
            return;
        }
        (self.recording, self.steps) = (None, 0);
        let Some(cache) = self.cache.take() else { return };
        let room = cache.len() + self.ahead;
        within(&self.recorder, || {
            self.place = Some(StepPlace::new(&cache.context, room, &self.device));
            self.cache = Some(cache.with_capacity(room));
        });
    }

    /// Takes a step, and finds out whether such steps can be recorded.
    fn rehearse(&mut self) {
        let Some(recorder) = self.recorder.take() else { return };
        let before = self.places(recorder.as_ref());
        let mut done = false;
        let uploads = recorder.uploads(&mut || {
            done = true;
            self.step();
        });
        let after = self.places(recorder.as_ref());
        self.recorder = Some(recorder);
        let reason = match (uploads, before == after && after.is_ok()) {
            (Err(error), _) => Some(error),
            (Ok(true), _) => Some(RecordError("the host uploads something for every step".into())),
            (Ok(false), false) => Some(RecordError("what the model carries moves from step to step".into())),
            (Ok(false), true) => None,
        };
        if let Some(reason) = reason {
            log::warn!("{reason}");
            self.note = Some(reason.to_string());
        }
        if !done {
            self.step();
        }
    }

    fn places(&self, recorder: &dyn Recorder<B>) -> Result<Vec<u64>, RecordError> {
        let draws = match &self.chooser {
            Some(Chooser::Drawn(_, draws)) => Some(draws.state()),
            _ => None,
        };
        match &self.cache {
            Some(cache) => places(recorder, &self.ids, [self.place.as_ref().map(StepPlace::places), draws], cache),
            None => Err(RecordError("a step broke off".into())),
        }
    }

    /// Enqueues a step.
    fn step(&mut self) {
        let Self { model, recorder, ids, cache, place, logits, known, chooser, .. } = self;
        let Some(taken) = cache.take() else { return };
        within(recorder, || {
            let rows = ids.dims()[0];
            drop(logits.take());
            let (hidden, next) = match place {
                Some(place) => model.step(ids.clone(), taken, place),
                None => model.hidden(ids.clone(), Some(taken), &Layout::full(rows, 1)),
            };
            *place = place.take().map(StepPlace::advance);
            let all = model.logits(hidden.squeeze_dim::<2>(1));
            if let Some(taken) = chooser.take() {
                let old = std::mem::replace(ids, Tensor::empty([1, 1], &all.device()));
                let (chosen, next) = taken.choose(all.clone(), *known, old);
                (*ids, *chooser) = (chosen, Some(next));
            }
            (*logits, *cache) = (Some(all), Some(next));
        });
    }

    /// Records a step, which is not taken by that.
    fn record(&mut self) -> Result<(), RecordError> {
        let Some(recorder) = self.recorder.take() else { return Ok(()) };
        let before = self.places(recorder.as_ref());
        let context = self.cache.as_ref().map(|cache| cache.context.clone());
        let made = recorder.record(&mut || self.step());
        if let (Some(cache), Some(context)) = (&mut self.cache, context) {
            cache.rewind(context);
        }
        let after = self.places(recorder.as_ref());
        self.recorder = Some(recorder);
        let made = made?;
        if before? != after? {
            return Err(RecordError("what the model carries moved".into()));
        }
        log::debug!("a decoding step is a recording of {} operations", made.operations());
        self.recording = Some(made);
        Ok(())
    }

    fn finished(&self) -> Result<()> {
        let checked = self.recording.as_ref().map_or(Ok(()), |recording| recording.check());
        checked.map_err(|error| Error::Device(error.to_string()))
    }

    /// Whether the tokens it chose were lost by [`Decoding::keep`]: then they are to be read.
    pub fn forgot(&self) -> bool {
        self.logits.is_none()
    }

    /// The token chosen for each row; `None` where the logits of one are not finite.
    ///
    /// # Errors
    /// When the device failed.
    pub fn chosen(&self) -> Result<Option<Vec<u32>>> {
        let ids: Vec<i32> = within(&self.recorder, || self.ids.clone().into_data()).iter::<i32>().collect();
        self.finished()?;
        Ok(self.active.iter().map(|&row| u32::try_from(ids[row]).ok()).collect())
    }

    /// The rows' logits after the tokens read last, one behind the other, in float32.
    ///
    /// # Errors
    /// When the device failed, or nothing was read yet.
    pub fn logits(&self) -> Result<Vec<f32>> {
        let Some(logits) = &self.logits else { return Err(Error::Device("nothing was read yet".into())) };
        let vocab = logits.dims()[1];
        let all = host_values(within(&self.recorder, || logits.clone().into_data()))?;
        self.finished()?;
        if self.active.len() * vocab == all.len() {
            return Ok(all);
        }
        Ok(self.active.iter().flat_map(|&row| all[row * vocab..(row + 1) * vocab].iter().copied()).collect())
    }

    /// Where the rows stand, and what they carry, on the host: all rows, those that ended included.
    ///
    /// # Errors
    /// When the device failed.
    pub fn state(&self) -> Result<(Context, Vec<(String, TensorData)>)> {
        let Some(cache) = &self.cache else { return Err(Error::Device("a step broke off".into())) };
        let read = || cache.tensors().into_iter().map(|(name, tensor)| (name, tensor.into_data())).collect();
        let tensors = within(&self.recorder, read);
        self.finished()?;
        Ok((cache.context.clone(), tensors))
    }

    /// Goes on with these of the rows alone, in ascending order.
    pub fn keep(&mut self, rows: &[usize]) {
        self.active = rows.iter().map(|&row| self.active[row]).collect();
        // A recording is of its batch. Rows that ended run along until they are the half.
        if self.active.len() * 2 > self.ids.dims()[0] && self.recorder.is_some() {
            return;
        }
        self.recording = None;
        self.logits = None;
        self.steps = 0;
        let kept = std::mem::replace(&mut self.active, (0..rows.len()).collect());
        let Some(cache) = self.cache.take() else { return };
        within(&self.recorder, || {
            let cache = cache.select_rows(&kept);
            if let Some(place) = &mut self.place {
                *place = StepPlace::new(&cache.context, place.capacity(), &self.device);
            }
            self.cache = Some(cache);
            self.chooser = self.chooser.take().map(|chooser| match chooser {
                Chooser::Greedy => Chooser::Greedy,
                Chooser::Drawn(options, draws) => Chooser::Drawn(options, draws.select_rows(&kept)),
            });
            self.ids = Tensor::zeros([kept.len(), 1], &self.device);
        });
    }
}

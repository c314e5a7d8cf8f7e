//! The output of a job: what it holds before the run, the parts that are committed during it, and the end.
//!
//! [`Sink::open`] decides by the table of the design document whether to start, to resume, to redo, to do nothing or to
//! refuse. Only files that carry our plan, footer or mark are ever deleted. Files whose names begin with `.` or `_`,
//! which readers of a directory of parts pass over, are neither in the way nor touched.
//!
//! In an object store there is no lock. Two runs of one job publish the same units there, each of them once; whoever comes
//! second finds a part of the same unit in its place, and leaves it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use arrow::datatypes::{Schema, SchemaRef};
use serde_json::Value;

use super::commit::{
    OutputLock, Published, TempFile, create_dirs_durably, fault_point, is_temp_name, parent_of, sync_dir,
};
use super::output::{OutputFormat, OutputTarget};
use super::part::{KEY_PREFIX, PartFooter, PartWriter, part_name, read_part_footer, unit_of_name};
use super::plan_file::{
    Comparison, JsonFile, PLAN_NAME, PlanFile, SUCCESS_NAME, SuccessFile, publish_json, read_json, write_json_in,
};
use super::single_file::{FinalFile, Marks, Stamp, assemble, check_format_supports, read_final_file, stamp_is_ours};
use super::store::{Entry, Location, StoredFile, concurrently};
use crate::error::{Error, Result};

/// What to do with an output that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExisting {
    /// No flag: an unfinished run is named, and left.
    Refuse,
    /// `--resume`.
    Resume,
    /// `--overwrite`.
    Overwrite,
    /// `run JOB.toml` without a flag: as [`OnExisting::Refuse`], but an unfinished run of the job is resumed.
    ResumeIfOurs,
}

/// What [`Sink::open`] found to do.
#[derive(Debug)]
pub enum Opened {
    /// Units are to be written.
    Work(Box<Sink>),
    /// The same job over the same inputs was finished before.
    NothingToDo(SuccessFile),
}

/// The output of a running job; the lock on it is held as long as this lives.
#[derive(Debug)]
pub struct Sink {
    target: OutputTarget,
    dir: Location,
    plan: PlanFile,
    /// Of the plan; hashed once, since the stamps of many inputs are long.
    rows_digest: String,
    schema: SchemaRef,
    finished: BTreeMap<usize, PartFooter>,
    changed_note: Option<String>,
    /// None in an object store.
    lock: Option<OutputLock>,
}

impl Sink {
    /// Looks at the output and makes it ready for the units of `plan`, whose rows have the columns of `schema`.
    ///
    /// Takes the lock, removes our stale temporary files, and writes `_plan.json` where a run starts.
    ///
    /// # Errors
    /// [`Error::CannotCreate`], [`Error::InputChanged`] and [`Error::AnotherJob`] as the table has it,
    /// [`Error::OutputLocked`] when another run holds the output, [`Error::Usage`] when a column does not fit the format.
    pub fn open(target: &OutputTarget, schema: SchemaRef, plan: PlanFile, on_existing: OnExisting) -> Result<Opened> {
        check_format_supports(&schema, target.format())?;
        let plan = plan.as_stored()?;
        let dir = target.parts_dir();
        // Before a directory is made: a finished or refused output is left as it is.
        if !dir.is_object() && !dir.path().is_dir() {
            let holding = Holding::of(target)?;
            if let Action::Nothing(success) = holding.decide(target, &plan, on_existing)? {
                return Ok(Opened::NothingToDo(success));
            }
            create_dirs_durably(dir.path())?;
        }
        let lock = if dir.is_object() { None } else { Some(OutputLock::acquire(dir.path())?) };
        let holding = Holding::of(target)?;
        let action = holding.decide(target, &plan, on_existing)?;
        let changed_note = match &action {
            Action::Resume(stored) => plan.changed_note(stored),
            _ => None,
        };
        if lock.as_ref().is_some_and(OutputLock::is_held) {
            remove(&holding.work.temps)?;
        }
        let (plan, finished) = match action {
            Action::Nothing(success) => {
                if let OutputTarget::File { .. } = target {
                    // The run before was killed between its final rename and this.
                    holding.work.remove_folder(&dir)?;
                }
                return Ok(Opened::NothingToDo(success));
            }
            Action::Start => {
                publish_plan(&dir, &plan)?;
                (plan, BTreeMap::new())
            }
            Action::Redo => {
                holding.remove_ours(target)?;
                publish_plan(&dir, &plan)?;
                (plan, BTreeMap::new())
            }
            Action::Resume(stored) => {
                // A mark of success above missing parts would be a lie.
                remove(holding.work.success_place(&dir).as_slice())?;
                (stored, holding.work.parts)
            }
        };
        let (target, schema) = (target.clone(), without_our_keys(&schema));
        let rows_digest = plan.rows_digest();
        let sink = Self { target, dir, plan, rows_digest, schema, finished, changed_note, lock };
        Ok(Opened::Work(Box::new(sink)))
    }

    /// Tells without touching anything whether [`Sink::open`] would refuse, or find nothing to do (`Some`).
    ///
    /// For a caller that wants to know before it loads a model.
    ///
    /// # Errors
    /// As [`Sink::open`].
    pub fn look(
        target: &OutputTarget,
        schema: &SchemaRef,
        plan: &PlanFile,
        on_existing: OnExisting,
    ) -> Result<Option<SuccessFile>> {
        check_format_supports(schema, target.format())?;
        match Holding::of(target)?.decide(target, &plan.as_stored()?, on_existing)? {
            Action::Nothing(success) => Ok(Some(success)),
            _ => Ok(None),
        }
    }

    /// The units that are committed already, with what their parts' footers say.
    pub fn finished_units(&self) -> &BTreeMap<usize, PartFooter> {
        &self.finished
    }

    /// The plan that the output holds: when resuming, the one of the first run.
    pub fn plan(&self) -> &PlanFile {
        &self.plan
    }

    /// The first note that differs from the run that is being resumed, as `max_batch_tokens: 8192, was 16384`.
    pub fn changed_note(&self) -> Option<&str> {
        self.changed_note.as_deref()
    }

    /// Begins the part of a unit.
    ///
    /// # Errors
    /// [`Error::CannotCreate`] or [`Error::Io`].
    pub fn part(&self, unit: usize) -> Result<PartWriter> {
        if unit >= parts_of(&self.plan) {
            return Err(Error::Internal(format!("unit {unit} of {} units", self.plan.units)));
        }
        PartWriter::create(&self.dir, unit, SchemaRef::clone(&self.schema), &self.footer_of(unit))
    }

    fn footer_of(&self, unit: usize) -> PartFooter {
        PartFooter::new(&self.plan.fingerprint, &self.rows_digest, unit)
    }

    /// Ends the job: checks every part's footer, then writes `_SUCCESS.json`, or the single file.
    ///
    /// A job without units gets one part without rows, so that its readers find the columns.
    ///
    /// # Errors
    /// [`Error::CannotCreate`] when a part is missing or not of this job, or something stands at the file's place;
    /// [`Error::Io`].
    pub fn complete(self, summary: Value) -> Result<()> {
        if self.plan.units == 0 && !self.finished.contains_key(&0) {
            self.part(0)?.finish()?;
        }
        let rows = match self.verified_rows() {
            Ok(rows) => rows,
            Err(error) => return if self.was_finished_by_another()? { Ok(()) } else { Err(error) },
        };
        fault_point("before-success");
        let success = SuccessFile {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fingerprint: self.plan.fingerprint.clone(),
            rows,
            parts: parts_of(&self.plan) as u64,
            summary,
        };
        match &self.target {
            OutputTarget::Directory(dir) => {
                match publish_json(dir, SUCCESS_NAME, &success)? {
                    Published::Now => Ok(()),
                    // Without locks, another run of this job over the same parts may have ended first.
                    Published::AlreadyThere => {
                        let place = dir.join(SUCCESS_NAME);
                        match read_json::<SuccessFile>(&place)?.ours() {
                            Some(there) if there.fingerprint == success.fingerprint => Ok(()),
                            _ => Err(in_the_way(place.path())),
                        }
                    }
                }
            }
            OutputTarget::File { place, format } => self.publish_file(place, *format, success),
        }
    }

    /// Whether another run of this job, which no lock kept out, has made the single file and removed the parts.
    fn was_finished_by_another(&self) -> Result<bool> {
        let OutputTarget::File { place, format } = &self.target else { return Ok(false) };
        if self.lock.as_ref().is_some_and(OutputLock::is_held) {
            return Ok(false);
        }
        match read_final_file(place, *format, self.target.stamp_place().as_ref())? {
            FinalFile::Ours(marks) if self.plan.compare(&marks.plan) == Comparison::Same => {
                // Parts of ours that came after its end.
                Work::of(&self.dir)?.remove_folder(&self.dir)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn verified_rows(&self) -> Result<u64> {
        let rows_of = |unit: &usize| {
            let place = self.dir.join(&part_name(*unit));
            match place.file()?.map(|part| read_part_footer(&part)).transpose()?.flatten() {
                Some(footer) if footer.same_unit(&self.footer_of(*unit)) => Ok(footer.rows),
                _ => {
                    let message =
                        "this part is missing or not of this job; run the same command with --resume".to_owned();
                    Err(Error::CannotCreate { path: place.path().to_owned(), message })
                }
            }
        };
        let units: Vec<usize> = (0..parts_of(&self.plan)).collect();
        let mut rows = 0;
        for part_rows in for_each(&self.dir, &units, rows_of) {
            rows += part_rows?;
        }
        if rows > self.plan.rows {
            return Err(Error::Internal(format!("{rows} rows were written, {} were planned", self.plan.rows)));
        }
        Ok(rows)
    }

    /// Assembles the file in the work folder, which is in the same file system, and publishes it.
    fn publish_file(&self, place: &Location, format: OutputFormat, success: SuccessFile) -> Result<()> {
        let parts: Vec<Location> = (0..parts_of(&self.plan)).map(|unit| self.dir.join(&part_name(unit))).collect();
        // The plan's notes and the summary tell of one run; the same job should give the same file.
        let plan = PlanFile { notes: Value::Null, ..self.plan.clone() };
        let marks = Marks { plan, success: SuccessFile { summary: Value::Null, ..success } };
        let temp = TempFile::create_in(&self.dir, &place.name())?;
        let temp = match assemble(&parts, &self.schema, format, &marks, temp) {
            Ok(temp) => temp,
            Err(error) => return if self.was_finished_by_another()? { Ok(()) } else { Err(error) },
        };
        let stamp_place = self.target.stamp_place();
        if let Some(stamp_place) = &stamp_place {
            let stamp = Stamp::of(&temp, marks.clone())?;
            write_json_in(&self.dir, "stamp.json", &stamp)?.replace_at(stamp_place)?;
        }
        if temp.publish(place)? == Published::AlreadyThere {
            match read_final_file(place, format, stamp_place.as_ref())? {
                FinalFile::Ours(there) if *there == marks => {}
                _ => return Err(in_the_way(place.path())),
            }
        }
        Work::of(&self.dir)?.remove_folder(&self.dir)
    }
}

/// Parts of a finished job: one without rows where there are no units.
fn parts_of(plan: &PlanFile) -> usize {
    usize::try_from(plan.units).unwrap_or(usize::MAX).max(1)
}

fn in_the_way(path: &Path) -> Error {
    let message =
        "appeared while the job ran and is not of this job; move it away and run the same command with --resume";
    Error::CannotCreate { path: path.to_owned(), message: message.to_owned() }
}

/// A Parquet reader hands the footer's keys on as the schema's; an output of ours as input must not pass on its own.
fn without_our_keys(schema: &SchemaRef) -> SchemaRef {
    let mut metadata = schema.metadata().clone();
    metadata.retain(|key, _| !key.starts_with(KEY_PREFIX));
    SchemaRef::new(Schema::new_with_metadata(schema.fields().clone(), metadata))
}

fn publish_plan(dir: &Location, plan: &PlanFile) -> Result<()> {
    match publish_json(dir, PLAN_NAME, plan)? {
        Published::Now => Ok(()),
        // Only where there are no locks, or they do not work: another run was quicker.
        Published::AlreadyThere => Err(Error::OutputLocked { path: dir.path().to_owned() }),
    }
}

/// Does `work` on each item: one after the other on a disk, many at once where each waits for an object store.
fn for_each<T: Sync, R: Send>(dir: &Location, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if dir.is_object() { concurrently(items, work) } else { items.iter().map(work).collect() }
}

fn remove(places: &[Location]) -> Result<()> {
    match places.first() {
        Some(first) => for_each(first, places, Location::remove).into_iter().collect(),
        None => Ok(()),
    }
}

/// An object store has no directories whose entries could be lost.
fn sync_folder(dir: &Location) -> Result<()> {
    if dir.is_object() { Ok(()) } else { sync_dir(dir.path()) }
}

/// What the directory of parts holds, told by names and footers.
#[derive(Debug, Default)]
struct Work {
    plan: Option<PlanFile>,
    success: Option<SuccessFile>,
    parts: BTreeMap<usize, PartFooter>,
    temps: Vec<Location>,
    /// The first file that is not ours and that a reader would see, or that has a name of ours.
    foreign: Option<PathBuf>,
    /// The first part of ours that is not of the plan.
    stray: Option<PathBuf>,
}

impl Work {
    fn of(dir: &Location) -> Result<Self> {
        let mut work = Work::default();
        let mut entries = match dir.entries() {
            Ok(entries) => entries,
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => {
                work.foreign = Some(dir.path().to_owned());
                return Ok(work);
            }
            Err(error) => return Err(error),
        };
        if dir.is_object() {
            // A listing may be behind, and a plan must not be overlooked.
            for name in [PLAN_NAME, SUCCESS_NAME] {
                if !entries.iter().any(|entry| entry.name == name) {
                    entries.push(Entry { location: dir.join(name), name: name.to_owned(), identity: None });
                }
            }
            entries.sort_by(|a, b| a.name.cmp(&b.name));
        }
        for (entry, held) in entries.iter().zip(for_each(dir, &entries, Held::of)) {
            match held? {
                Held::Nothing => {}
                Held::Plan(plan) => work.plan = Some(*plan),
                Held::Success(success) => work.success = Some(success),
                Held::Part(unit, footer) => drop(work.parts.insert(unit, footer)),
                Held::Temp => work.temps.push(entry.location.clone()),
                Held::Foreign => drop(work.foreign.get_or_insert_with(|| entry.location.path().to_owned())),
            }
        }
        work.stray = work.find_stray(dir);
        Ok(work)
    }

    fn find_stray(&self, dir: &Location) -> Option<PathBuf> {
        let part = |unit: usize| dir.join(&part_name(unit)).path().to_owned();
        let Some(plan) = &self.plan else {
            let success = self.success_place(dir).map(|place| place.path().to_owned());
            return self.parts.keys().next().map(|unit| part(*unit)).or(success);
        };
        let digest = plan.rows_digest();
        let belongs = |unit: usize, footer: &PartFooter| {
            unit < parts_of(plan) && footer.same_unit(&PartFooter::new(&plan.fingerprint, &digest, unit))
        };
        let stray = self.parts.iter().find(|(unit, footer)| !belongs(**unit, footer));
        stray.map(|(unit, _)| part(*unit))
    }

    fn success_place(&self, dir: &Location) -> Option<Location> {
        self.success.as_ref().map(|_| dir.join(SUCCESS_NAME))
    }

    /// Removes what is ours. The plan goes last: what a kill leaves behind is an unfinished run, not files of nobody.
    fn remove_ours(&self, dir: &Location) -> Result<()> {
        remove(self.success_place(dir).as_slice())?;
        sync_folder(dir)?;
        remove(&self.parts.keys().map(|unit| dir.join(&part_name(*unit))).collect::<Vec<_>>())?;
        sync_folder(dir)?;
        remove(self.plan.as_ref().map(|_| dir.join(PLAN_NAME)).as_slice())?;
        sync_folder(dir)
    }

    /// Removes the work folder of a single file that is finished.
    fn remove_folder(&self, dir: &Location) -> Result<()> {
        remove(&self.temps)?;
        self.remove_ours(dir)?;
        if dir.is_object() {
            return Ok(());
        }
        let dir = dir.path();
        match fs::remove_dir(dir) {
            // Something that is not ours stays, and the folder with it.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("remove", dir)(error)),
            Ok(()) => sync_dir(parent_of(dir)),
        }
    }
}

/// What one entry of the directory of parts is.
#[derive(Debug)]
enum Held {
    /// It is gone, or passed over by readers and by us.
    Nothing,
    Plan(Box<PlanFile>),
    Success(SuccessFile),
    Part(usize, PartFooter),
    Temp,
    Foreign,
}

impl Held {
    fn of(entry: &Entry) -> Result<Self> {
        let (place, name) = (&entry.location, entry.name.as_str());
        Ok(if name == PLAN_NAME {
            match read_json(place)? {
                JsonFile::Ours(plan) => Held::Plan(Box::new(plan)),
                JsonFile::Missing => Held::Nothing,
                JsonFile::Foreign => Held::Foreign,
            }
        } else if name == SUCCESS_NAME {
            match read_json(place)? {
                JsonFile::Ours(success) => Held::Success(success),
                JsonFile::Missing => Held::Nothing,
                JsonFile::Foreign => Held::Foreign,
            }
        } else if let Some(unit) = unit_of_name(name) {
            let part = match &entry.identity {
                Some(identity) => Some(StoredFile::new(place.clone(), identity.clone())),
                None if place.is_object() || !place.path().is_file() => None,
                None => place.file()?,
            };
            // Published parts are whole: what cannot be read was never one.
            match part.map(|part| read_part_footer(&part)).transpose() {
                Ok(Some(Some(footer))) => Held::Part(unit, footer),
                Ok(_) | Err(Error::InputCorrupt { .. }) => Held::Foreign,
                // Removed, or replaced, since it was listed: another run is at work.
                Err(Error::InputChanged { .. }) if place.is_object() => Held::Nothing,
                Err(error) => return Err(error),
            }
        } else if is_temp_name(name) {
            Held::Temp
        } else if name.starts_with(['.', '_']) {
            Held::Nothing
        } else {
            Held::Foreign
        })
    }
}

/// Everything that the output holds.
#[derive(Debug)]
struct Holding {
    work: Work,
    /// The finished file of a single-file output.
    file: FinalFile,
    foreign: Option<PathBuf>,
}

/// What the table says.
#[derive(Debug)]
enum Action {
    Start,
    Resume(PlanFile),
    Redo,
    Nothing(SuccessFile),
}

impl Holding {
    fn of(target: &OutputTarget) -> Result<Self> {
        let work = Work::of(&target.parts_dir())?;
        let mut foreign = work.foreign.clone();
        let mut file = FinalFile::Missing;
        if let OutputTarget::File { place, format } = target {
            let stamp = target.stamp_place();
            file = read_final_file(place, *format, stamp.as_ref())?;
            if let Some(stamp) = stamp
                && !stamp_is_ours(&stamp)?
            {
                foreign = Some(stamp.path().to_owned());
            }
            if let FinalFile::Foreign = file {
                foreign = Some(place.path().to_owned());
            }
        }
        Ok(Self { work, file, foreign })
    }

    /// The plan that the output follows, with the mark of success if it is finished.
    fn state(&self, target: &OutputTarget) -> Option<(&PlanFile, Option<&SuccessFile>)> {
        if let FinalFile::Ours(marks) = &self.file {
            return Some((&marks.plan, Some(&marks.success)));
        }
        let plan = self.work.plan.as_ref()?;
        let success = self.work.success.as_ref().filter(|success| {
            let is_the_result = matches!(target, OutputTarget::Directory(_));
            is_the_result && success.fingerprint == plan.fingerprint && self.work.parts.len() == parts_of(plan)
        });
        Some((plan, success))
    }

    /// The design's table of what an output may hold, row by row.
    fn decide(&self, target: &OutputTarget, plan: &PlanFile, on_existing: OnExisting) -> Result<Action> {
        let refuse = |path: &Path, message: String| Err(Error::CannotCreate { path: path.to_owned(), message });
        if let Some(foreign) = &self.foreign {
            let message = "is in the way and not known to be ours; move it away, or choose another --output";
            return refuse(foreign, message.to_owned());
        }
        let finished_file = matches!(self.file, FinalFile::Ours(_));
        let stray = self.work.stray.as_ref().filter(|_| !finished_file);
        let state = self.state(target);
        if on_existing == OnExisting::Overwrite && (state.is_some() || self.work.stray.is_some()) {
            return Ok(Action::Redo);
        }
        if let Some(stray) = stray {
            let message = "belongs to another job than the rest; choose another --output, or redo it with --overwrite";
            return refuse(stray, message.to_owned());
        }
        let Some((theirs, success)) = state else { return Ok(Action::Start) };
        let path = target.path();
        match (plan.compare(theirs), success) {
            (Comparison::Another { difference }, _) if on_existing == OnExisting::Resume => {
                Err(Error::AnotherJob { path: path.to_owned(), difference })
            }
            (Comparison::Another { difference }, _) => refuse(
                path,
                format!("holds another job ({difference}); choose another --output, or redo it with --overwrite"),
            ),
            (Comparison::InputsChanged { path: input, difference }, _) => Err(Error::InputChanged {
                path: input.map_or_else(|| path.to_owned(), PathBuf::from),
                message: difference,
            }),
            (Comparison::Same, Some(success)) => Ok(Action::Nothing(success.clone())),
            (Comparison::Same, None) if on_existing == OnExisting::Refuse => refuse(
                path,
                "holds an unfinished run of this job; go on with --resume, or start again with --overwrite".to_owned(),
            ),
            (Comparison::Same, None) => Ok(Action::Resume(theirs.clone())),
        }
    }

    /// Removes what is ours of the output; only called when nothing foreign is there.
    fn remove_ours(&self, target: &OutputTarget) -> Result<()> {
        if let (FinalFile::Ours(_), OutputTarget::File { place, .. }) = (&self.file, target) {
            remove(std::slice::from_ref(place))?;
            remove(target.stamp_place().as_slice())?;
            if !place.is_object() {
                sync_dir(parent_of(place.path()))?;
            }
        }
        self.work.remove_ours(&target.parts_dir())
    }
}

#[cfg(test)]
mod store_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExitCode;
    use OnExisting::{Overwrite, Refuse, Resume, ResumeIfOurs};
    use arrow::array::{ArrayRef, Int32Array, RecordBatch};
    use parquet::arrow::ArrowWriter;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use serde_json::json;
    use std::fs::File;
    use std::sync::Arc;
    use tempfile::TempDir;

    pub(super) const ENDINGS: [&str; 5] = ["dir", "out.parquet", "out.arrow", "out.jsonl", "out.csv"];

    pub(super) fn batch(values: &[i32]) -> RecordBatch {
        RecordBatch::try_from_iter([("x", Arc::new(Int32Array::from(values.to_vec())) as ArrayRef)]).unwrap()
    }

    pub(super) fn schema() -> SchemaRef {
        batch(&[]).schema()
    }

    /// Two units of two rows.
    pub(super) fn plan() -> PlanFile {
        let inputs = json!([{"path": "in.parquet", "size": 10}]);
        PlanFile::new(json!({"settings": {"max_length": 128}}), json!({"threads": 1}), inputs, 2, 2, 4)
    }

    pub(super) fn other_job() -> PlanFile {
        let plan = plan();
        PlanFile::new(json!({"settings": {"max_length": 256}}), plan.notes, plan.inputs, 2, 2, 4)
    }

    pub(super) fn other_inputs() -> PlanFile {
        PlanFile { inputs: json!([{"path": "in.parquet", "size": 11}]), ..plan() }
    }

    pub(super) fn open(target: &OutputTarget, plan: PlanFile, on_existing: OnExisting) -> Result<Opened> {
        Sink::open(target, schema(), plan, on_existing)
    }

    pub(super) fn work(target: &OutputTarget, plan: PlanFile, on_existing: OnExisting) -> Box<Sink> {
        match open(target, plan, on_existing).unwrap() {
            Opened::Work(sink) => sink,
            Opened::NothingToDo(_) => panic!("there is work to do"),
        }
    }

    pub(super) fn write_unit(sink: &Sink, unit: usize) {
        let mut part = sink.part(unit).unwrap();
        part.write(&batch(&[unit as i32 * 2, unit as i32 * 2 + 1])).unwrap();
        assert_eq!(part.finish().unwrap().rows, 2);
    }

    pub(super) fn run_to_end(target: &OutputTarget, plan: PlanFile, on_existing: OnExisting) {
        let sink = work(target, plan, on_existing);
        for unit in 0..2 {
            if !sink.finished_units().contains_key(&unit) {
                write_unit(&sink, unit);
            }
        }
        sink.complete(json!({"seconds": 1.5})).unwrap();
    }

    pub(super) fn run_half(target: &OutputTarget, plan: PlanFile) {
        write_unit(&work(target, plan, Refuse), 1);
    }

    pub(super) fn refused(result: Result<Opened>, code: ExitCode, says: &str) {
        let error = result.unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }

    pub(super) fn nothing_to_do(result: Result<Opened>) -> SuccessFile {
        match result.unwrap() {
            Opened::NothingToDo(success) => success,
            Opened::Work(_) => panic!("there is nothing to do"),
        }
    }

    fn each_target(test: impl Fn(&OutputTarget, &Path)) {
        for ending in ENDINGS {
            let dir = TempDir::new().unwrap();
            test(&OutputTarget::new(dir.path().join(ending)), dir.path());
        }
    }

    fn parts_dir(target: &OutputTarget) -> PathBuf {
        target.parts_dir().path().to_owned()
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.collect();
        names.sort();
        names
    }

    #[test]
    fn row_nothing_there_starts() {
        for on_existing in [Refuse, Resume, Overwrite, ResumeIfOurs] {
            each_target(|target, dir| {
                run_to_end(target, plan(), on_existing);
                match target {
                    OutputTarget::Directory(path) => {
                        assert_eq!(
                            names(path.path()),
                            [SUCCESS_NAME, PLAN_NAME, "part-000000.parquet", "part-000001.parquet"]
                        )
                    }
                    OutputTarget::File { place, .. } => {
                        let stamps = usize::from(target.stamp_place().is_some());
                        assert_eq!(names(dir).len(), 1 + stamps, "{:?}", names(dir));
                        assert!(place.path().is_file());
                    }
                }
            });
        }
    }

    #[test]
    fn row_no_plan_yet_starts() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join(".gitkeep"), "").unwrap();
        run_to_end(&OutputTarget::new(dir.path()), plan(), Refuse);
        assert!(dir.path().join(".gitkeep").exists());
    }

    #[test]
    fn row_unfinished() {
        each_target(|target, _| {
            run_half(target, plan());
            refused(open(target, plan(), Refuse), ExitCode::CannotCreate, "--resume");
            for on_existing in [Resume, ResumeIfOurs] {
                let sink = work(target, plan(), on_existing);
                let finished = sink.finished_units().iter().map(|(unit, footer)| (*unit, footer.rows));
                assert_eq!(finished.collect::<Vec<_>>(), [(1, 2)]);
                assert_eq!(sink.changed_note(), None);
            }
            let sink = work(target, plan(), Overwrite);
            assert!(sink.finished_units().is_empty());
            assert_eq!(names(&parts_dir(target)), [PLAN_NAME]);
            drop(sink);
            run_to_end(target, plan(), Resume);
            nothing_to_do(open(target, plan(), Refuse));
        });
    }

    #[test]
    fn row_finished() {
        each_target(|target, _| {
            run_to_end(target, plan(), Refuse);
            for on_existing in [Refuse, Resume, ResumeIfOurs] {
                let success = nothing_to_do(open(target, plan(), on_existing));
                assert_eq!((success.rows, success.parts), (4, 2));
                assert_eq!(success.fingerprint, plan().fingerprint);
            }
            run_to_end(target, plan(), Overwrite);
            nothing_to_do(open(target, plan(), Refuse));
        });
    }

    #[test]
    fn row_inputs_changed() {
        each_target(|target, _| {
            for finish in [false, true] {
                if finish {
                    run_to_end(target, plan(), Resume)
                } else {
                    run_half(target, plan())
                }
                for on_existing in [Refuse, Resume, ResumeIfOurs] {
                    refused(open(target, other_inputs(), on_existing), ExitCode::InputData, "in.parquet: changed");
                }
            }
            run_to_end(target, other_inputs(), Overwrite);
            nothing_to_do(open(target, other_inputs(), Refuse));
        });
    }

    #[test]
    fn row_another_job() {
        each_target(|target, _| {
            for finish in [false, true] {
                if finish {
                    run_to_end(target, plan(), Resume)
                } else {
                    run_half(target, plan())
                }
                let difference = "settings.max_length: 256, was 128";
                refused(open(target, other_job(), Resume), ExitCode::Config, difference);
                refused(open(target, other_job(), Refuse), ExitCode::CannotCreate, difference);
                refused(open(target, other_job(), ResumeIfOurs), ExitCode::CannotCreate, difference);
            }
            run_to_end(target, other_job(), Overwrite);
            nothing_to_do(open(target, other_job(), Refuse));
        });
    }

    #[test]
    fn row_files_that_are_not_ours() {
        each_target(|target, _| {
            let place = match target {
                OutputTarget::Directory(place) => {
                    fs::create_dir(place.path()).unwrap();
                    place.path().join("notes.txt")
                }
                OutputTarget::File { place, .. } => place.path().to_owned(),
            };
            fs::write(&place, "mine").unwrap();
            for on_existing in [Refuse, Resume, Overwrite, ResumeIfOurs] {
                refused(open(target, plan(), on_existing), ExitCode::CannotCreate, &place.display().to_string());
            }
            assert_eq!(fs::read(&place).unwrap(), b"mine");
            assert!(matches!(target, OutputTarget::Directory(_)) || !parts_dir(target).exists());
        });
    }

    #[test]
    fn overwriting_leaves_everything_alone_if_one_file_is_foreign() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path());
        run_to_end(&target, plan(), Refuse);
        let foreign = dir.path().join("part-000002.parquet");
        let mut writer = ArrowWriter::try_new(File::create(&foreign).unwrap(), schema(), None).unwrap();
        writer.write(&batch(&[1])).unwrap();
        writer.close().unwrap();
        refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, "part-000002.parquet");
        assert_eq!(names(dir.path()).len(), 5);
        fs::remove_file(&foreign).unwrap();
        fs::write(dir.path().join(PLAN_NAME), "{}").unwrap();
        refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, PLAN_NAME);
        assert_eq!(names(dir.path()).len(), 4);
    }

    #[test]
    fn a_file_where_a_directory_should_be_is_foreign() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("out"), "mine").unwrap();
        let target = OutputTarget::new(dir.path().join("out"));
        refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, "out");
    }

    #[test]
    fn a_changed_csv_is_foreign_and_a_copied_one_is_ours() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("out.csv");
        let target = OutputTarget::new(&path);
        run_to_end(&target, plan(), Refuse);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(String::from_utf8(bytes.clone()).unwrap(), "x\n0\n1\n2\n3\n");
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bytes).unwrap();
        nothing_to_do(open(&target, plan(), Refuse));
        fs::write(&path, "x\n0\n1\n2\n4\n").unwrap();
        // File systems with coarse clocks would give the edit the time of the stamp.
        File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, "out.csv");
        fs::remove_file(&path).unwrap();
        fs::write(target.stamp_place().unwrap().path(), "{}").unwrap();
        refused(open(&target, plan(), Overwrite), ExitCode::CannotCreate, ".json");
    }

    #[test]
    fn a_part_of_another_job_is_never_taken_for_ours() {
        for theirs in [other_job(), other_inputs()] {
            let dir = TempDir::new().unwrap();
            let target = OutputTarget::new(dir.path());
            run_half(&target, plan());
            let footer = PartFooter::new(&theirs.fingerprint, &theirs.rows_digest(), 0);
            PartWriter::create(&dir.path().into(), 0, schema(), &footer).unwrap().finish().unwrap();
            for on_existing in [Refuse, Resume, ResumeIfOurs] {
                refused(open(&target, plan(), on_existing), ExitCode::CannotCreate, "part-000000.parquet");
            }
            run_to_end(&target, plan(), Overwrite);
        }
    }

    #[test]
    fn parts_without_a_plan_are_refused_and_redone() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path());
        run_to_end(&target, plan(), Refuse);
        fs::remove_file(dir.path().join(PLAN_NAME)).unwrap();
        refused(open(&target, plan(), Resume), ExitCode::CannotCreate, "--overwrite");
        run_to_end(&target, plan(), Overwrite);
    }

    #[test]
    fn a_lost_part_of_a_finished_output_is_written_again() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path());
        run_to_end(&target, plan(), Refuse);
        fs::remove_file(dir.path().join("part-000000.parquet")).unwrap();
        refused(open(&target, plan(), Refuse), ExitCode::CannotCreate, "--resume");
        let sink = work(&target, plan(), Resume);
        assert!(!dir.path().join(SUCCESS_NAME).exists());
        drop(sink);
        run_to_end(&target, plan(), Resume);
        nothing_to_do(open(&target, plan(), Resume));
    }

    #[test]
    fn stale_temporary_files_of_ours_go() {
        each_target(|target, _| {
            run_half(target, plan());
            let stale = parts_dir(target).join(".part-000000.parquet.tmp-123-0123456789abcdef");
            let not_ours = parts_dir(target).join(".part-000000.parquet.tmp");
            fs::write(&stale, "half a part").unwrap();
            fs::write(&not_ours, "").unwrap();
            work(target, plan(), Resume);
            assert!(!stale.exists());
            assert!(not_ours.exists());
        });
    }

    #[test]
    fn a_second_run_is_told_to_wait() {
        each_target(|target, _| {
            let first = work(target, plan(), Refuse);
            for on_existing in [Refuse, Resume, Overwrite] {
                refused(open(target, plan(), on_existing), ExitCode::TryAgain, "another run");
            }
            drop(first);
            work(target, plan(), Resume);
        });
    }

    #[test]
    fn a_missing_file_is_rebuilt_from_its_folder() {
        each_target(|target, _| {
            let sink = work(target, plan(), Refuse);
            (0..2).for_each(|unit| write_unit(&sink, unit));
            drop(sink);
            let sink = work(target, plan(), Resume);
            assert_eq!(sink.finished_units().len(), 2);
            sink.complete(Value::Null).unwrap();
            assert_eq!(nothing_to_do(open(target, plan(), Resume)).rows, 4);
        });
    }

    #[test]
    fn a_folder_beside_a_finished_file_is_cleaned_up() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path().join("out.parquet"));
        run_half(&target, plan());
        let aside = TempDir::new().unwrap();
        for name in names(&parts_dir(&target)) {
            fs::copy(parts_dir(&target).join(&name), aside.path().join(&name)).unwrap();
        }
        run_to_end(&target, plan(), Resume);
        fs::create_dir(parts_dir(&target)).unwrap();
        for name in names(aside.path()) {
            fs::copy(aside.path().join(&name), parts_dir(&target).join(&name)).unwrap();
        }
        nothing_to_do(open(&target, plan(), Refuse));
        assert_eq!(names(dir.path()), ["out.parquet"]);
    }

    #[test]
    fn ending_without_all_parts_is_refused() {
        each_target(|target, _| {
            let sink = work(target, plan(), Refuse);
            write_unit(&sink, 1);
            let error = sink.complete(Value::Null).unwrap_err();
            assert!(error.to_string().contains("part-000000.parquet"), "{error}");
            refused(open(target, plan(), Refuse), ExitCode::CannotCreate, "--resume");
        });
    }

    #[test]
    fn a_file_that_appears_meanwhile_is_not_replaced() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path().join("out.jsonl"));
        let sink = work(&target, plan(), Refuse);
        (0..2).for_each(|unit| write_unit(&sink, unit));
        fs::write(target.path(), "mine").unwrap();
        assert_eq!(sink.complete(Value::Null).unwrap_err().exit_code(), ExitCode::CannotCreate);
        assert_eq!(fs::read(target.path()).unwrap(), b"mine");
        fs::remove_file(target.path()).unwrap();
        work(&target, plan(), Resume).complete(Value::Null).unwrap();
    }

    #[test]
    fn a_job_without_units_gives_the_columns() {
        each_target(|target, _| {
            let empty = PlanFile { units: 0, rows: 0, ..plan() };
            work(target, empty.clone(), Refuse).complete(Value::Null).unwrap();
            assert_eq!(nothing_to_do(open(target, empty, Refuse)).rows, 0);
            let parquet = match target {
                OutputTarget::Directory(place) => place.path().join(part_name(0)),
                OutputTarget::File { place, format: OutputFormat::Parquet } => place.path().to_owned(),
                OutputTarget::File { .. } => return,
            };
            let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(parquet).unwrap()).unwrap();
            assert_eq!(reader.schema().fields(), schema().fields());
        });
    }

    #[test]
    fn notes_may_differ() {
        let dir = TempDir::new().unwrap();
        let target = OutputTarget::new(dir.path());
        run_half(&target, plan());
        let sink = work(&target, PlanFile { notes: json!({"threads": 8}), ..plan() }, Resume);
        assert_eq!(sink.changed_note(), Some("threads: 8, was 1"));
        assert_eq!(sink.plan().notes, json!({"threads": 1}));
    }

    #[test]
    fn the_same_job_gives_the_same_file() {
        for ending in &ENDINGS[1..] {
            let dir = TempDir::new().unwrap();
            let files = ["a", "b"].map(|name| dir.path().join(name).join(ending));
            run_to_end(&OutputTarget::new(&files[0]), plan(), Refuse);
            let resumed = OutputTarget::new(&files[1]);
            run_half(&resumed, PlanFile { notes: json!({"threads": 8}), ..plan() });
            run_to_end(&resumed, plan(), Resume);
            assert!(fs::read(&files[0]).unwrap() == fs::read(&files[1]).unwrap(), "{ending}");
        }
    }

    #[test]
    fn the_keys_of_an_input_of_ours_are_not_passed_on() {
        let keys =
            [("mistral_batch.unit", "3"), ("theirs", "kept")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let schema = SchemaRef::new(Schema::new_with_metadata(schema().fields().clone(), keys.into()));
        assert_eq!(without_our_keys(&schema).metadata().keys().collect::<Vec<_>>(), ["theirs"]);
    }
}

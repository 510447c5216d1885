"""The database itself refuses to change, unbalance or back-date the ledger, whoever asks (except who may drop triggers).

All triggers are ENABLE ALWAYS, so `session_replication_role = replica` does not switch them off. Names are
qualified, so that a temporary table cannot take the place of a real one, and nothing is cast implicitly.
"""

from django.db import migrations

INSERT_ONLY_TABLES = (
    "billing_auditrecord",
    "billing_book",
    "billing_journalentry",
    "billing_journalkey",
    "billing_posting",
)

FUNCTIONS = """
CREATE FUNCTION public.tollbook_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'integrity_constraint_violation',
        CONSTRAINT = 'insert_only',
        MESSAGE = format('%s is insert-only: %s refused', TG_TABLE_NAME, TG_OP),
        HINT = 'Nothing recorded is changed. Correct a journal entry by a reversal and a new entry.';
END $$;

CREATE FUNCTION public.tollbook_lock_month(day date, is_exclusive boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    -- Posting into a month and closing it exclude each other; posters share.
    month_key integer := (extract(year FROM day) * 12 + extract(month FROM day))::integer;
BEGIN
    IF is_exclusive THEN
        PERFORM pg_advisory_xact_lock(841001, month_key);
    ELSE
        PERFORM pg_advisory_xact_lock_shared(841001, month_key);
    END IF;
END $$;

CREATE FUNCTION public.tollbook_guard_journal_entry() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- These two are facts about the write, so nobody may state them.
    NEW.created_in := pg_current_xact_id();
    NEW.posted_at := statement_timestamp();
    PERFORM public.tollbook_lock_month(NEW.effective_on, false);
    IF EXISTS (
        SELECT FROM public.billing_settlementperiod AS period
        WHERE period.status = 'CLOSED'
          AND period.period_start <= NEW.effective_on AND NEW.effective_on < period.period_end
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_in_closed_period',
            MESSAGE = format('%s lies in a closed period', NEW.effective_on),
            HINT = 'Date the entry in an open period and name the closed one as its origin_period.';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_guard_posting() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    entry record;
BEGIN
    SELECT journal_entry.created_in, journal_entry.posting_count INTO entry
    FROM public.billing_journalentry AS journal_entry
    WHERE journal_entry.id = NEW.journal_entry_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'posting_of_no_entry',
            MESSAGE = format('there is no journal entry %s for this posting', NEW.journal_entry_id),
            HINT = 'Insert the entry first, in the same database transaction.';
    END IF;
    IF entry.created_in <> pg_current_xact_id() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_is_sealed',
            MESSAGE = format('journal entry %s is sealed: it was committed', NEW.journal_entry_id),
            HINT = 'A posting joins an entry only in the database transaction that made it. Post a new entry.';
    END IF;
    IF NEW.position < 1 OR NEW.position > entry.posting_count THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_is_full',
            MESSAGE = format('journal entry %s states %s postings: position %s refused',
                             NEW.journal_entry_id, entry.posting_count, NEW.position);
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION public.tollbook_check_journal_entry() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    actual_count bigint;
    unbalanced record;
BEGIN
    SELECT count(*) INTO actual_count
    FROM public.billing_posting AS posting WHERE posting.journal_entry_id = NEW.id;
    IF actual_count <> NEW.posting_count::bigint THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_complete',
            MESSAGE = format('journal entry %s states %s postings and has %s', NEW.id, NEW.posting_count, actual_count);
    END IF;
    SELECT posting.currency AS currency, sum(posting.amount) AS difference INTO unbalanced
    FROM public.billing_posting AS posting
    WHERE posting.journal_entry_id = NEW.id
    GROUP BY posting.currency HAVING sum(posting.amount) <> 0::numeric
    ORDER BY posting.currency LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_balanced',
            MESSAGE = format('journal entry %s does not balance: debits less credits are %s %s',
                             NEW.id, trim_scale(unbalanced.difference), unbalanced.currency);
    END IF;
    IF NOT EXISTS (SELECT FROM public.billing_journalkey AS key WHERE key.journal_entry_id = NEW.id) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'integrity_constraint_violation',
            CONSTRAINT = 'journal_entry_has_key',
            MESSAGE = format('journal entry %s has no idempotency key', NEW.id),
            HINT = 'Post through billing.services.ledger.post_journal_entries().';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION public.tollbook_guard_ledger_account() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.code = OLD.code AND NEW.type = OLD.type THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = 'integrity_constraint_violation',
        CONSTRAINT = 'ledger_account_fixed',
        MESSAGE = format('account %s keeps its code and type: %s refused', OLD.code, TG_OP),
        HINT = 'An account may be renamed. For another type, add another account.';
END $$;

CREATE FUNCTION public.tollbook_guard_settlement_period() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    is_unchanged boolean;
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.status = 'CLOSED' THEN
        -- What was empty at the close may be filled in once.
        is_unchanged := TG_OP = 'UPDATE'
            AND to_jsonb(NEW) - '{digest_sha256,closed_at,closed_by_id}'::text[]
              = to_jsonb(OLD) - '{digest_sha256,closed_at,closed_by_id}'::text[]
            AND (OLD.digest_sha256 = '' OR NEW.digest_sha256 = OLD.digest_sha256)
            AND (OLD.closed_at IS NULL OR NEW.closed_at = OLD.closed_at)
            AND (OLD.closed_by_id IS NULL OR NEW.closed_by_id IS NOT DISTINCT FROM OLD.closed_by_id);
        IF NOT coalesce(is_unchanged, false) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'integrity_constraint_violation',
                CONSTRAINT = 'settlement_period_is_closed',
                MESSAGE = format('the settlement period %s is closed: %s refused', to_char(OLD.period_start, 'YYYY-MM'), TG_OP);
        END IF;
    END IF;
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    IF NEW.status = 'CLOSED' THEN
        -- Waits for the postings into this month that are under way.
        PERFORM public.tollbook_lock_month(NEW.period_start, true);
    END IF;
    RETURN NEW;
END $$;
"""

COLUMNS = """
ALTER TABLE public.billing_journalentry
    ADD COLUMN created_in xid8 NOT NULL DEFAULT pg_current_xact_id(),
    ADD CONSTRAINT journal_entry_dates_finite CHECK (isfinite(effective_on) AND isfinite(occurred_at));
ALTER TABLE public.billing_settlementperiod
    ADD CONSTRAINT settlement_period_is_a_month CHECK (
        period_start = date_trunc('month', period_start::timestamp)::date
        AND period_end = (period_start::timestamp + interval '1 month')::date
    );
"""

TRIGGERS = """
CREATE TRIGGER guard_insert BEFORE INSERT ON public.billing_journalentry
    FOR EACH ROW EXECUTE FUNCTION public.tollbook_guard_journal_entry();
ALTER TABLE public.billing_journalentry ENABLE ALWAYS TRIGGER guard_insert;

CREATE CONSTRAINT TRIGGER check_balance AFTER INSERT ON public.billing_journalentry
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.tollbook_check_journal_entry();
ALTER TABLE public.billing_journalentry ENABLE ALWAYS TRIGGER check_balance;

CREATE TRIGGER guard_insert BEFORE INSERT ON public.billing_posting
    FOR EACH ROW EXECUTE FUNCTION public.tollbook_guard_posting();
ALTER TABLE public.billing_posting ENABLE ALWAYS TRIGGER guard_insert;

CREATE TRIGGER guard_change BEFORE UPDATE OR DELETE ON public.billing_ledgeraccount
    FOR EACH ROW EXECUTE FUNCTION public.tollbook_guard_ledger_account();
ALTER TABLE public.billing_ledgeraccount ENABLE ALWAYS TRIGGER guard_change;

CREATE TRIGGER guard_change BEFORE INSERT OR UPDATE OR DELETE ON public.billing_settlementperiod
    FOR EACH ROW EXECUTE FUNCTION public.tollbook_guard_settlement_period();
ALTER TABLE public.billing_settlementperiod ENABLE ALWAYS TRIGGER guard_change;
CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON public.billing_settlementperiod
    FOR EACH STATEMENT EXECUTE FUNCTION public.tollbook_refuse_change();
ALTER TABLE public.billing_settlementperiod ENABLE ALWAYS TRIGGER refuse_truncate;
""" + "".join(
    f"""
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE OR TRUNCATE ON public.{table}
    FOR EACH STATEMENT EXECUTE FUNCTION public.tollbook_refuse_change();
ALTER TABLE public.{table} ENABLE ALWAYS TRIGGER refuse_change;
"""
    for table in INSERT_ONLY_TABLES
)

REMOVE = """
DROP FUNCTION public.tollbook_refuse_change, public.tollbook_guard_journal_entry, public.tollbook_guard_posting,
    public.tollbook_check_journal_entry, public.tollbook_guard_ledger_account,
    public.tollbook_guard_settlement_period, public.tollbook_lock_month CASCADE;
ALTER TABLE public.billing_journalentry DROP COLUMN created_in, DROP CONSTRAINT journal_entry_dates_finite;
ALTER TABLE public.billing_settlementperiod DROP CONSTRAINT settlement_period_is_a_month;
"""


class Migration(migrations.Migration):
    dependencies = [("billing", "0002_ledger_posting_positions")]

    operations = [migrations.RunSQL(FUNCTIONS + COLUMNS + TRIGGERS, REMOVE)]

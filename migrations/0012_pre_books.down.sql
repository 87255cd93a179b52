DROP TABLE postroad.book_findings;
DROP TABLE postroad.books;
DROP TABLE postroad.book_comparisons;
DROP TABLE postroad.book_entries;
DROP TABLE postroad.book_start;
DROP INDEX postroad.ix_recipients_waiting;
